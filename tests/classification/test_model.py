"""Models of the programs, and the preprocessing that they need."""

import numpy as np
import pytest
import torch

from engine import data
from engine.batches import build_batches
from engine.data import open_training_data
from engine.model import build_model, channels_of, create_any, data_config, model_arguments
from engine.options import TrainOptions
from mambavision.errors import UserError
from mambavision.running.group import Group


@pytest.mark.parametrize("words", [["--input-size", "1", "32", "32"], ["--model-kwargs", "in_chans=1"]], ids=" ".join)
@pytest.mark.parametrize("aug_splits", ["0", "2"], ids=["batches", "prefetched"])
def test_grey_images_need_one_option_only(digits, words, aug_splits):
    words = [*words, "--model", "test_resnet", "--aug-splits", aug_splits, "--mixup=0", "--cutmix=0", "--workers=0"]
    options = TrainOptions.parse(["--data-dir", str(digits), "--batch-size=8", *words])
    train, validation, classes = open_training_data(options.data, (8, 8), channels_of(options.model), 0)
    model = build_model(options.model, options.averaging, model_arguments(options.model, classes), 0)
    config = data_config(model, vars(options.model))
    batches = build_batches(options, config, model.num_classes, train, validation, Group())
    assert config["input_size"][0] == len(config["mean"]) == len(config["std"]) == 1
    assert config["mean"][0] == pytest.approx(np.mean(model.pretrained_cfg["mean"]))
    for loader in (batches.train.epoch(0), batches.validation):
        assert model(next(iter(loader))[0]).isfinite().all()


def test_means_of_other_channels_are_refused(digits):
    model = create_any("test_resnet", False, {"in_chans": 1})
    assert data_config(model, {"mean": [0.5]})["mean"] == (0.5,)
    assert data_config(create_any("test_resnet", False, {}), {"std": [0.5]})["std"] == (0.5,) * 3
    with pytest.raises(UserError, match="--mean has 3 values, and the images have 1 channels"):
        data_config(model, {"mean": [0.1, 0.2, 0.3]})
    with pytest.raises(UserError, match="image files have 1"):
        data.open_split(data_dir=str(digits), split="train", channels=4)


def test_batch_statistics_over_all_gpus_keep_the_activations(monkeypatch):
    monkeypatch.setattr("engine.model._can_synchronise", lambda: True)
    plain, synchronised = (
        build_model(options.model, options.averaging, {"num_classes": 3}, 0).eval()
        for options in (TrainOptions.parse(["--model", "test_efficientnet", *words]) for words in ([], ["--sync-bn"]))
    )
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synchronised.modules())
    synchronised.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(synchronised(x), plain(x))


def test_wrong_model_arguments_are_one_sentence():
    with pytest.raises(UserError, match="mamba_vision_T: dt_init must be"):
        create_any("mamba_vision_T", False, {"dt_init": "other"})
