"""The segmentation configs, resolved, against what the published models were trained with."""

from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope

from checkout import ROOT
from mambavision.openmmlab.config import load_config

CONFIGS = ROOT / "semantic_segmentation" / "configs"
BACKBONES = {
    "tiny": (80, 32, (1, 3, 8, 4), (2, 4, 8, 16), (8, 8, 64, 32), None, "mamba_vision_T"),
    "small": (96, 64, (3, 3, 7, 5), (2, 4, 8, 16), (8, 8, 160, 56), None, "mamba_vision_S"),
    "base": (128, 64, (3, 3, 10, 5), (2, 4, 8, 16), (8, 8, 64, 32), 1e-5, "mamba_vision_B"),
    "l3": (256, 64, (3, 3, 20, 10), (4, 8, 16, 32), (8, 8, 64, 32), 1e-5, "mamba_vision_L3_512_21k"),
}
FIELDS = ("dim", "in_dim", "depths", "num_heads", "window_size", "layer_scale", "pretrained")


class Recipe(NamedTuple):
    """What differs between the published models; parameters of the model and of its backbone."""

    width: int  # of the backbone's first stage
    parameters: tuple[int, int]
    side: int = 512
    wrapper: str = "AmpOptimWrapper"
    lr: float = 5e-5
    weight_decay: float = 0.01
    batch_size: int = 1
    interval: int = 10000  # iterations between validations
    save_interval: int = 10000


_vssm = partial(Recipe, wrapper="OptimWrapper", lr=6e-5, batch_size=2, interval=16000, save_interval=16000)
MAMBA_VISION = {
    "mamba_vision/mamba_vision_160k_ade20k-512x512_tiny": Recipe(80, (62_518_764, 31_154_368)),
    "mamba_vision/mamba_vision_160k_ade20k-512x512_small": Recipe(96, (81_794_092, 49_372_928), lr=6e-5, batch_size=2),
    "mamba_vision/mamba_vision_160k_ade20k-512x512_base": Recipe(128, (131_196_780, 96_662_080)),
    "mamba_vision/mamba_vision_160k_ade20k-640x640_l3_21k": Recipe(
        256, (780_513_900, 737_525_056), 640, "OptimWrapper", lr=8e-5, weight_decay=0.05, interval=5000
    ),
}
VSSM = {
    "vmamba/upernet_vssm_4xb4-160k_ade20k-512x512_tiny": _vssm(96, (61_902_572, 29_481_408)),
    "vmamba/upernet_vssm_4xb4-160k_ade20k-512x512_tiny1": _vssm(96, (62_359_340, 29_938_176)),
    "vmamba/upernet_vssm_4xb4-160k_ade20k-512x512_small": _vssm(96, (81_801_260, 49_380_096)),
    "vmamba/upernet_vssm_4xb4-160k_ade20k-512x512_base": _vssm(128, (122_069_292, 87_534_592)),
    "vmamba/upernet_vssm_4xb4-160k_ade20k-640x640_small": _vssm(96, (81_801_260, 49_380_096), 640),
    "vmamba/upernet_vssm_4xb4-160k_ade20k-896x896_small": _vssm(96, (81_801_260, 49_380_096), 896),
}
PUBLISHED = MAMBA_VISION | VSSM
OTHERS = {  # classes
    "mamba_vision/mamba_vision_160k_ade20k-512x512_tiny_tight_windows": 150,
    "mamba_vision/mamba_vision_160k_cityscapes-512x1024_tiny": 19,
    "mamba_vision/mamba_vision_160k_coco-stuff164k-512x512_tiny": 171,
    "mamba_vision/mamba_vision_160k_own-data-512x512_tiny": 3,
    "mamba_vision/upernet_mamba_vision_digits": 11,
    "vmamba/upernet_vssm_digits": 11,
}


@cache
def resolved(name):
    return load_config(CONFIGS / f"{name}.py")


def built(config):
    """Without memory for the weights."""
    with DefaultScope.overwrite_default_scope("mmseg"), torch.device("meta"):
        import mmseg.models  # noqa: F401

        return ROOT_MODELS.build(config.model)


@pytest.fixture(params=PUBLISHED)
def name(request):
    return request.param


@pytest.fixture
def recipe(name):
    return PUBLISHED[name]


@pytest.fixture
def config(name):
    return resolved(name)


@pytest.mark.parametrize(("name", "size"), list(zip(MAMBA_VISION, BACKBONES, strict=True)))
def test_mamba_vision(name, size):
    backbone = resolved(name).model.backbone
    assert backbone.type == "MM_mamba_vision"
    assert tuple(backbone.get(field) for field in FIELDS) == BACKBONES[size]
    # The published configs say 0.3, 0.7, 0.4 and 0.8, but the wrapper they were trained with has 0.2 in any case.
    assert backbone.drop_path_rate == 0.2
    assert not {"embed_dims", "patch_size", "norm_cfg", "drop_rate"} & backbone.keys()


def test_heads(config, recipe):
    model, dim = config.model, recipe.width
    assert (model.type, model.test_cfg) == ("EncoderDecoder", {"mode": "whole"})
    decode, auxiliary = model.decode_head, model.auxiliary_head
    assert (decode.type, decode.in_channels) == ("UPerHead", [dim, 2 * dim, 4 * dim, 8 * dim])
    assert (decode.in_index, decode.pool_scales, decode.channels) == ([0, 1, 2, 3], (1, 2, 3, 6), 512)
    assert decode.loss_decode == {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
    assert (auxiliary.type, auxiliary.in_channels, auxiliary.in_index) == ("FCNHead", 4 * dim, 2)
    assert (auxiliary.channels, auxiliary.num_convs, auxiliary.concat_input) == (256, 1, False)
    assert auxiliary.loss_decode == {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 0.4}
    for head in (decode, auxiliary):
        assert (head.num_classes, head.dropout_ratio, head.align_corners) == (150, 0.1, False)
        assert head.norm_cfg.type == "SyncBN"


def test_data(config, recipe):
    side = recipe.side
    preprocessor = config.model.data_preprocessor
    assert preprocessor.size == (side, side)
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]
    assert (preprocessor.bgr_to_rgb, preprocessor.pad_val, preprocessor.seg_pad_val) == (True, 0, 255)
    load, labels, resize, crop, flip, colours, _ = config.train_dataloader.dataset.pipeline
    assert load.type == "LoadImageFromFile"
    assert labels == {"type": "LoadAnnotations", "reduce_zero_label": True}
    assert (resize.type, resize.scale, resize.ratio_range) == ("RandomResize", (4 * side, side), (0.5, 2.0))
    assert resize.keep_ratio
    assert crop == {"type": "RandomCrop", "crop_size": (side, side), "cat_max_ratio": 0.75}
    assert flip == {"type": "RandomFlip", "prob": 0.5}
    assert colours == {"type": "PhotoMetricDistortion"}
    assert config.test_dataloader.dataset.pipeline[1] == {
        "type": "Resize",
        "scale": (4 * side, side),
        "keep_ratio": True,
    }
    for loader, split in (("train", "training"), ("val", "validation"), ("test", "validation")):
        dataset = config[f"{loader}_dataloader"].dataset
        assert (dataset.type, dataset.data_root) == ("ADE20KDataset", "data/ade/ADEChallengeData2016")
        assert dataset.data_prefix == {"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"}
        assert config[f"{loader}_dataloader"].num_workers == 4
    scales, flips = config.tta_pipeline[1].transforms[:2]
    assert [scale.scale_factor for scale in scales] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert [(flip.prob, flip.direction) for flip in flips] == [(0.0, "horizontal"), (1.0, "horizontal")]
    assert config.tta_model.type == "SegTTAModel"
    assert config.test_evaluator.iou_metrics == ["mIoU"]


def test_schedule(config, recipe):
    wrapper, optimizer = config.optim_wrapper, config.optim_wrapper.optimizer
    assert (wrapper.type, optimizer.lr, optimizer.weight_decay) == (recipe.wrapper, recipe.lr, recipe.weight_decay)
    assert (config.train_dataloader.batch_size, config.train_cfg.val_interval) == (recipe.batch_size, recipe.interval)
    assert (optimizer.type, optimizer.betas) == ("AdamW", (0.9, 0.999))
    assert wrapper.paramwise_cfg == {"custom_keys": {"norm": {"decay_mult": 0.0}}}
    assert "clip_grad" not in wrapper
    warmup, decay = config.param_scheduler
    assert warmup == {"type": "LinearLR", "start_factor": 1e-6, "by_epoch": False, "begin": 0, "end": 1500}
    assert decay == {
        "type": "PolyLR", "eta_min": 0.0, "power": 1.0, "by_epoch": False, "begin": 1500, "end": 160000
    }  # fmt: skip
    assert config.train_cfg.max_iters == 160000
    hooks = config.default_hooks
    assert (hooks.checkpoint.interval, hooks.logger.interval) == (recipe.save_interval, 50)
    assert config.env_cfg.cudnn_benchmark


def test_parameters(config, recipe):
    model = built(config)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (model, model.backbone)]
    assert tuple(counts) == recipe.parameters


@pytest.mark.parametrize("name", OTHERS)
def test_other_configs(name):
    config = resolved(name)
    model = built(config)
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == OTHERS[name]


def test_every_config_is_tested():
    configs = [path for path in CONFIGS.glob("*/*.py") if path.parent.name not in ("_base_", "segman")]
    assert {f"{path.parent.name}/{path.stem}" for path in configs} == {*PUBLISHED, *OTHERS}


def test_data_root_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("ADE20K_ROOT", "/elsewhere")
    assert resolved.__wrapped__(next(iter(PUBLISHED))).train_dataloader.dataset.data_root == "/elsewhere"
