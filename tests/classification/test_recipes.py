"""Recipes: each is valid, and what was published."""

import pytest

from checkout import ROOT
from engine.options import TrainOptions

RECIPES = sorted((ROOT / "classification" / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    TrainOptions.parse(["--config", str(path)])


PUBLISHED = {
    "mambavision_tiny_1k": ("mamba_vision_T", 0.05, 20, 0.5, 0.25, 1.0),
    "mambavision_tiny2_1k": ("mamba_vision_T2", 0.05, 20, 0.75, 0.25, 1.0),
    "mambavision_small_1k": ("mamba_vision_S", 0.05, 20, 1.0, 0.25, 0.875),
    "mambavision_base_1k": ("mamba_vision_B", 0.075, 35, 1.0, 0.3, 1.0),
    "mambavision_large_1k": ("mamba_vision_L", 0.12, 20, 6.0, 0.25, 1.0),
    "mambavision_large2_1k": ("mamba_vision_L2", 0.12, 20, 6.0, 0.25, 1.0),
}

COMMON = {
    "opt": "lamb", "lr": 5e-3, "opt_betas": [0.9, 0.999], "opt_eps": 1e-8, "clip_grad": 5.0, "clip_mode": "norm",
    "batch_size": 128, "sched": "cosine", "epochs": 310, "cooldown_epochs": 10, "warmup_lr": 1e-6, "min_lr": 5e-6,
    "amp": True, "bfloat": False, "channels_last": True, "model_ema": True, "model_ema_decay": 0.9998,
    "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "smoothing": 0.1,
    "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "remode": "pixel", "recount": 1, "color_jitter": 0.4,
    "hflip": 0.5, "vflip": 0.0, "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "train_interpolation": "random",
    "drop_rate": None, "drop_path": None, "dist_bn": "reduce", "sync_bn": False, "seed": 31,
    "input_size": [3, 224, 224], "checkpoint_hist": 1, "log_interval": 50, "lr_ep": False,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name):
    args = TrainOptions.parse(["--config", str(ROOT / f"classification/configs/mambavision/{name}.yaml")]).flat()
    keys = ("model", "weight_decay", "warmup_epochs", "mesa", "mesa_start_ratio", "crop_pct")
    expected = COMMON | dict(zip(keys, PUBLISHED[name], strict=True))
    assert {key: args[key] for key in expected} == expected


VMAMBA = {
    "vmambav2v_tiny_224": ("vmamba_tiny_s1l8", None),
    "vmambav2v_small_224": ("vmamba_small_s1l20", None),
    "vmambav2v_base_224": ("vmamba_base_s1l20", None),
    "vmambav2_tiny_224": ("vmamba_tiny_s2l5", None),
    "vmambav2_small_224": ("vmamba_small_s2l15", None),
    "vmambav2_base_224": ("vmamba_base_s2l15", None),
    "vmambav0_tiny_224": ("vanilla_vmamba_tiny", None),
    "vmambav0_small_224": ("vanilla_vmamba_small", None),
    "vmambav0_base_224": ("vanilla_vmamba_base", 0.5),
}

OF_VMAMBA = COMMON | {
    "opt": "adamw", "weight_decay": 0.05, "epochs": 300, "warmup_epochs": 20, "warmup_prefix": True,
    "cooldown_epochs": 0, "lr": None, "lr_base": 5e-4, "lr_base_size": 512, "lr_base_scale": "linear",
    "lr_base_bounds": True, "warmup_lr": 5e-7, "min_lr": 5e-6, "no_prefetcher": True,
    "grad_accum_steps": 1, "mesa": 0.0, "model_ema_decay": 0.9999, "channels_last": False, "crop_pct": None,
    "train_interpolation": "bicubic", "seed": 0, "pin_mem": True, "grad_checkpointing": False, "model_kwargs": {},
}  # fmt: skip


@pytest.mark.parametrize("name", VMAMBA)
def test_recipes_of_vmamba_are_the_published_ones(name):
    args = TrainOptions.parse(["--config", str(ROOT / f"classification/configs/vmamba/{name}.yaml")]).flat()
    expected = OF_VMAMBA | dict(zip(("model", "drop_path"), VMAMBA[name], strict=True))
    assert {key: args[key] for key in expected} == expected


SEGMAN = {"t": (0.0, 512, False), "s": (0.15, 256, True), "b": (0.3, 256, True), "l": (0.3, 256, True)}

OF_SEGMAN = COMMON | {
    "opt": "adamw", "weight_decay": 0.05, "epochs": 300, "warmup_epochs": 5, "warmup_prefix": False, "min_lr": 1e-5,
    "model_ema_decay": 0.99984, "channels_last": False, "crop_pct": None, "seed": 42, "sync_bn": True, "mesa": 0.0,
    "lr": None, "lr_base": 1e-3, "lr_base_size": 1024, "lr_base_scale": "linear", "lr_base_bounds": False,
    "lr_ep": True, "no_prefetcher": False,
}  # fmt: skip


@pytest.mark.parametrize("variant", SEGMAN)
def test_recipes_of_segman_are_the_published_ones(variant):
    args = TrainOptions.parse(
        ["--config", str(ROOT / f"classification/configs/segman/segman_{variant}_1k.yaml")]
    ).flat()
    expected = OF_SEGMAN | dict(zip(("drop_path", "batch_size", "amp"), SEGMAN[variant], strict=True))
    expected |= {"model": f"segman_encoder_{variant}"}
    assert {key: args[key] for key in expected} == expected
