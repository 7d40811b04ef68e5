"""SegMAN in segmentation: recorded numbers, parameter names, arguments, weights, sizes."""

import json
import logging

import numpy as np
import pytest
import torch
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import mambavision
from checkout import ROOT
from mambavision.errors import CheckpointError, UserError
from mambavision.openmmlab import RegisteredBackbone, SegMANEncoder_s, SegMANEncoder_t
from mambavision.openmmlab.backbones.features import BackboneArgumentError
from mambavision.openmmlab.config import explained, load_config
from mambavision.openmmlab.segman_decoder import SegMANDecoder
from parity import DATA, condition_, fill_, image
from small_models import SMALL

SIZE = {key: value for key, value in SMALL["segman_encoder_t"].items() if key not in ("projection", "num_classes")}
HEAD = {"in_channels": [8, 16, 24, 32], "channels": 8, "feat_proj_dim": 12, "num_classes": 5}
TOLERANCE = {"": 1e-4, "_conditioned": 1e-5}  # of the largest value


def recorded_arrays(name):
    return dict(np.load(DATA / "segman" / f"{name}.npz"))


def check(y, expected):
    """Compare a map with the summary of a recorded one; return what is off by most."""
    scale = float(expected["absmax"])
    assert list(y.shape) == expected["shape"].tolist()
    first = expected["first"]
    found = [np.abs(y.flatten()[: len(first)].numpy() - first).max(), abs(y.mean().item() - expected["mean"])]
    found += [abs(y.std().item() / expected["std"] - 1) * scale, abs(y.abs().max().item() - scale)]
    if "center" in expected:
        height, width = y.shape[2:]
        found.append(np.abs(y[0, :, height // 2, width // 2].numpy() - expected["center"]).max())
    return max(found) / scale


# Recorded numbers


@pytest.fixture(scope="module", params=["t", "s"])
def recorded_segmentor(request):
    """The model of the config, without the parts that have no weights."""
    config = load_config(ROOT / "semantic_segmentation" / "configs" / "segman" / f"segman_{request.param}_ade.py")
    manifest = json.loads((DATA / "segman" / f"segmentor_{request.param}_manifest.json").read_text())
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    return request.param, model, manifest


def test_entries_are_the_originals(recorded_segmentor):
    _, model, manifest = recorded_segmentor
    entries = [[key, list(value.shape), str(value.dtype)[6:]] for key, value in model.state_dict().items()]
    assert sorted(entries) == sorted(manifest["state"])
    theirs = [key.split(".")[1] for key, *_ in manifest["state"] if key.startswith("decode_head.")]
    assert [name for name, part in model.decode_head.named_children() if part.state_dict()] == list(
        dict.fromkeys(theirs)
    )
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, model.backbone, model.decode_head)]
    assert counts == [manifest["params"], manifest["params_backbone"], manifest["params_head"]]


@torch.inference_mode()
@pytest.mark.parametrize("weights", ["", "_conditioned"])
def test_logits_are_the_originals(recorded_segmentor, weights):
    variant, model, _ = recorded_segmentor
    fill_(model)
    if weights:
        condition_(model)
    logits = model(image(1, 512, 512, seed=6))
    expected = recorded_arrays(f"segmentor_{variant}_seg_logits_512{weights}")
    assert check(logits, expected) < TOLERANCE[weights]
    classes = torch.bincount(logits.argmax(1).flatten(), minlength=logits.shape[1])
    assert (classes - torch.from_numpy(expected["argmax_hist"])).abs().sum() <= 4


@torch.inference_mode()
@pytest.mark.parametrize("weights", ["", "_conditioned"])
@pytest.mark.parametrize(("variant", "backbone"), [("t", SegMANEncoder_t), ("s", SegMANEncoder_s)])
def test_features_are_the_originals(variant, backbone, weights):
    model = fill_(backbone()).eval()
    if weights:
        condition_(model)
    arrays = recorded_arrays(f"encoder_{variant}_features_256x320{weights}")
    maps = model(image(1, 256, 320, seed=5))
    assert len(maps) == 4
    for index, features in enumerate(maps):
        prefix = f"feat{index}_"
        expected = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        assert check(features, expected) < TOLERANCE[weights]


def test_norms_of_the_decoder():
    """What the recorded logits are not sensitive to."""
    head = SegMANDecoder(**HEAD, norm_cfg={"type": "BN"})
    assert head.vssm.norm1.eps == head.vssm.norm2.eps == 1e-6
    assert all(norm.eps == 1e-5 for norm in head.modules() if isinstance(norm, nn.BatchNorm2d))


# The decoder


@pytest.mark.parametrize("size", [(72, 104), (64, 96), (40, 33)])
def test_any_size(size):
    """Sides that are no multiples of 32, whose maps of stride 8 cannot be folded as they are."""
    backbone, head = SegMANEncoder_t(**SIZE), SegMANDecoder(**HEAD, norm_cfg={"type": "BN"})
    logits = head(backbone(torch.randn(2, 3, *size)))
    assert logits.shape == (2, 5, -(-size[0] // 8), -(-size[1] // 8))
    logits.square().mean().backward()
    # All of them, which several processes rely on.
    assert all(parameter.grad.isfinite().all() for part in (backbone, head) for parameter in part.parameters())


@torch.inference_mode()
def test_what_is_added_at_the_border_is_cut_off():
    head = fill_(SegMANDecoder(**HEAD, norm_cfg={"type": "BN"})).eval()
    x = torch.randn(1, 8, 8, 12)
    x[..., 7, :], x[..., 10:] = x[..., 6, :], x[..., 9:10]  # as if repeated
    torch.testing.assert_close(head._scan(x[..., :7, :10]), head._scan(x)[..., :7, :10])


def test_single_image_in_training():
    maps = SegMANEncoder_t(**SIZE)(torch.randn(1, 3, 64, 64))
    head = SegMANDecoder(**HEAD, norm_cfg={"type": "SyncBN"})
    with pytest.raises(UserError, match=r"training needs batches of two images or more, .* image_pool"):
        head(maps)
    assert head.eval()(maps).shape == (1, 5, 8, 8)
    assert SegMANDecoder(**HEAD, norm_cfg={"type": "GN", "num_groups": 2})(maps).shape == (1, 5, 8, 8)


def test_arguments_without_effect_are_named(caplog):
    with caplog.at_level(logging.INFO):
        SegMANDecoder(**HEAD, image_size=512, decoder_params={"embed_dim": 256}, interpolate_mode="bilinear")
        SegMANEncoder_t(**SIZE, style="pytorch", image_size=224, sr_ratio=1)
    assert "these arguments have no effect: image_size, interpolate_mode, decoder_params" in caplog.text
    assert "SegMANEncoder_t: these arguments have no effect: style, image_size, sr_ratio" in caplog.text


def test_wrong_arguments():
    with (
        pytest.raises(UserError, match=r"c\.py: SegMANDecoder has no argument 'chanels'. Did you mean 'channels'"),
        explained("c.py"),
        DefaultScope.overwrite_default_scope("mmseg"),
    ):
        MODELS.build({"type": "mmseg.SegMANDecoder", **HEAD, "chanels": 8})
    with (
        pytest.raises(UserError, match=r"missing 1 required keyword-only argument: 'feat_proj_dim'"),
        explained("c.py"),
    ):
        SegMANDecoder([8, 16, 24, 32], 8, num_classes=5)
    with pytest.raises(UserError, match=r"needs four maps, in_channels=\[8, 16\] and in_index=\[0, 1\]"):
        SegMANDecoder(**{**HEAD, "in_channels": [8, 16], "in_index": [0, 1]})
    with pytest.raises(BackboneArgumentError, match=r"SegMANEncoder_t has no argument 'drop_path'. .*'drop_path_rate'"):
        SegMANEncoder_t(drop_path=0.1)


@pytest.mark.parametrize("name", ["mamba_vision_T", "vmamba_tiny_s1l8", "resnet18"])
def test_other_backbones(name):
    small = {key: value for key, value in SMALL.get(name, {}).items() if key != "num_classes"}
    indices = (1, 2, 3, 4) if name == "resnet18" else (0, 1, 2, 3)
    backbone = RegisteredBackbone(name, indices, norm_layer=None, **small)
    widths = [backbone.trunk.feature_info[index]["num_chs"] for index in indices]
    head = SegMANDecoder(**{**HEAD, "in_channels": widths})
    assert head(backbone(torch.randn(2, 3, 64, 64))).shape == (2, 5, 8, 8)
    assert not [key for key in backbone.state_dict() if not key.startswith("model.")]


# The backbones


@pytest.mark.parametrize("variant", ["t", "l2"])
def test_backbones_are_the_classifiers(variant):
    with torch.device("meta"):
        backbone = MODELS.build({"type": f"SegMANEncoder_{variant}", "drop_path_rate": 0.1})
        model = mambavision.create_model(f"segman_encoder_{variant}", drop_path_rate=0.1)
    assert list(backbone.state_dict()) == [key for key in model.state_dict() if not key.startswith("classifier.")]
    assert str(backbone.layers) == str(model.layers)  # with stochastic depth


def test_recomputation_as_the_original_says_it():
    plain, some = SegMANEncoder_t(**SIZE), SegMANEncoder_t(**SIZE, use_checkpoint=[1, 0, 0, 0])
    assert not any(stage.grad_checkpointing for stage in plain.stages)
    assert all(stage.grad_checkpointing for stage in some.stages)


@torch.inference_mode()
def test_batch_norms_can_be_synchronised():
    backbone = fill_(SegMANEncoder_t(**SIZE)).eval()
    x = torch.randn(1, 3, 64, 64)
    before = backbone(x)
    synchronised = convert_sync_batchnorm(backbone, "torch").eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronised.modules())
    torch.testing.assert_close(synchronised(x), before)


@pytest.fixture
def released(tmp_path):
    """A file as the authors write it; the averaged weights differ."""
    model = fill_(mambavision.create_model("segman_encoder_t", **SMALL["segman_encoder_t"]))
    weights = {f"module.{key}": value.clone() for key, value in model.state_dict().items()}
    average = {key: value + 1 for key, value in weights.items()}
    path = str(tmp_path / "SegMAN_Encoder_t.pth.tar")
    mambavision.save_checkpoint({"state_dict": weights, "state_dict_ema": average, "epoch": 3}, path)
    return path, weights, average


def test_averaged_weights_are_preferred(released, tmp_path, caplog):
    path, weights, average = released
    backbone = SegMANEncoder_t(**SIZE, pretrained=path)
    with caplog.at_level(logging.INFO):
        backbone.init_weights()
    assert all(torch.equal(value, average[f"module.{key}"]) for key, value in backbone.state_dict().items())
    count = len(backbone.state_dict())
    assert f"starts from the averaged (EMA) weights of {path}: {count} entries loaded, 0 missing" in caplog.text
    assert "unexpected (classifier.0.weight, " in caplog.text
    plain = str(tmp_path / "plain.pth.tar")
    mambavision.save_checkpoint({"state_dict": weights}, plain)
    backbone = SegMANEncoder_t(**SIZE, init_cfg={"type": "Pretrained", "checkpoint": plain})
    with caplog.at_level(logging.INFO):
        backbone.init_weights()
    assert all(torch.equal(value, weights[f"module.{key}"]) for key, value in backbone.state_dict().items())
    assert f"starts from the weights of {plain}: " in caplog.text


def test_weights_of_another_model_are_refused(released):
    with pytest.raises(CheckpointError, match=r"to another model than the backbone: .* of another shape \(layers\."):
        SegMANEncoder_t(**{**SIZE, "embed_dims": (8, 16, 24, 40)}, pretrained=released[0]).init_weights()


def test_missing_weights_are_in_the_log(caplog):
    SegMANEncoder_t(**SIZE).init_weights()
    assert "starts untrained; for those of a classifier, set model.backbone.pretrained to its file" in caplog.text
