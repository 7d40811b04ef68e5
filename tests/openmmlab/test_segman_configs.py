"""SegMAN's configs, resolved, against what the original trains with."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope

from checkout import ROOT, load_program
from mambavision.openmmlab.config import load_config
from mambavision.openmmlab.training.config_steps import for_machine
from mambavision.openmmlab.training.options import TrainOptions
from mambavision.running.group import Group
from mambavision.running.process import Process

CONFIGS = ROOT / "semantic_segmentation" / "configs" / "segman"
WIDTHS = {
    "t": [32, 64, 144, 192],
    "s": [64, 144, 288, 512],
    "b": [96, 160, 364, 560],
    "l": [96, 192, 432, 640],
    "l2": [96, 192, 448, 640],
}
PROJECTED = {"t": 192, "s": 288, "b": 320, "l": 432, "l2": 448}
BACKBONES = {"t": 2_281_334, "s": 23_955_222, "b": 43_419_170, "l": 79_301_840, "l2": 79_294_700}  # parameters
SLIDE = {"mode": "slide", "crop_size": (1024, 1024), "stride": (768, 768)}


class Config(NamedTuple):
    """What differs between the configs."""

    channels: int
    head: int  # parameters
    interval: int  # iterations between validations
    keeps_best: bool
    drop_path: float


TABLE = {
    "segman_t_ade": Config(128, 4_115_926, 4000, True, 0.0),
    "segman_t_cityscapes": Config(128, 4_099_027, 4000, False, 0.0),
    "segman_t_coco": Config(128, 4_118_635, 4000, True, 0.0),
    "segman_s_ade": Config(144, 5_469_414, 8000, False, 0.15),
    "segman_s_cityscapes": Config(152, 6_018_931, 4000, True, 0.2),
    "segman_s_coco": Config(144, 5_472_459, 4000, True, 0.2),
    "segman_b_ade": Config(180, 8_383_650, 8000, True, 0.25),
    "segman_b_cityscapes": Config(180, 8_359_939, 4000, False, 0.25),
    "segman_b_coco": Config(180, 8_387_451, 4000, False, 0.2),
    "segman_l_ade": Config(224, 13_033_894, 8000, True, 0.3),
    "segman_l_cityscapes": Config(224, 13_004_419, 4000, False, 0.3),
    "segman_l_coco": Config(224, 13_038_619, 4000, False, 0.3),
    "segman_l2_cityscapes": Config(224, 13_064_147, 8000, False, 0.3),
}
OTHERS = {"segman_decoder_mamba_vision_t_ade": 150, "segman_decoder_vmamba_t_ade": 150, "segman_digits": 11}
CLASSES = {"ade": 150, "cityscapes": 19, "coco": 171}


@cache
def resolved(name):
    return load_config(CONFIGS / f"{name}.py")


def built(config):
    """Without memory for the weights."""
    with DefaultScope.overwrite_default_scope("mmseg"), torch.device("meta"):
        return MODELS.build(config.model)


@pytest.fixture(params=TABLE)
def name(request):
    return request.param


@pytest.fixture
def config(name):
    return resolved(name)


def test_model(config, name):
    _, variant, data = name.split("_")
    model, backbone, head, row = config.model, config.model.backbone, config.model.decode_head, TABLE[name]
    assert model.type == "EncoderDecoder"
    assert "auxiliary_head" not in model
    assert backbone == {"type": f"SegMANEncoder_{variant}", "pretrained": None, "drop_path_rate": row.drop_path}
    assert (head.type, head.in_channels, head.in_index) == ("SegMANDecoder", WIDTHS[variant], [0, 1, 2, 3])
    assert (head.channels, head.feat_proj_dim, head.num_classes) == (row.channels, PROJECTED[variant], CLASSES[data])
    assert (head.dropout_ratio, head.align_corners) == (0.1, False)
    assert head.norm_cfg == {"type": "SyncBN", "requires_grad": True}
    assert config.sync_bn == "torch"
    assert head.loss_decode == {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
    assert model.test_cfg == (SLIDE if data == "cityscapes" and variant in "tsb" else {"mode": "whole"})
    parts = built(config)
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in (parts.backbone, parts.decode_head)]
    assert counts == [BACKBONES[variant], row.head]


def test_data(config, name):
    data = name.split("_")[-1]
    side, batch, kind, scale, root = {
        "ade": (512, 4, "ADE20KDataset", (2048, 512), "data/ade/ADEChallengeData2016"),
        "cityscapes": (1024, 2, "CityscapesDataset", (2048, 1024), "data/cityscapes"),
        "coco": (512, 4, "COCOStuffDataset", (2048, 512), "data/coco_stuff164k"),
    }[data]
    preprocessor = config.model.data_preprocessor
    assert (preprocessor.size, preprocessor.pad_val, preprocessor.seg_pad_val) == ((side, side), 0, 255)
    assert (preprocessor.mean, preprocessor.std) == ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    assert preprocessor.bgr_to_rgb
    masks = {"type": "LoadAnnotations"} | ({"reduce_zero_label": True} if data == "ade" else {})
    steps = config.train_dataloader.dataset.pipeline
    assert steps == [
        {"type": "LoadImageFromFile"},
        masks,
        {"type": "RandomResize", "scale": scale, "ratio_range": (0.5, 2.0), "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": (side, side), "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
        {"type": "PackSegInputs"},
    ]
    multiple = [] if data == "cityscapes" else [{"type": "ResizeToMultiple", "size_divisor": 32}]
    scaled = [{"type": "LoadImageFromFile"}, {"type": "Resize", "scale": scale, "keep_ratio": True}, *multiple]
    for loader in (config.val_dataloader, config.test_dataloader):
        assert (loader.dataset.type, loader.dataset.data_root, loader.batch_size) == (kind, root, 1)
        assert loader.dataset.pipeline == [*scaled, masks, {"type": "PackSegInputs"}]
    loader = config.train_dataloader
    assert (loader.dataset.type, loader.dataset.data_root, loader.batch_size) == (kind, root, batch)
    assert (loader.sampler.type, loader.sampler.shuffle) == ("InfiniteSampler", True)
    assert config.auto_scale_lr == {"enable": False, "base_batch_size": 4 * batch}
    assert config.test_evaluator.iou_metrics == ["mIoU"]


def test_schedule(config, name):
    wrapper, row, hooks = config.optim_wrapper, TABLE[name], config.default_hooks
    assert wrapper.type == "OptimWrapper"
    assert wrapper.optimizer == {"type": "AdamW", "lr": 6e-5, "betas": (0.9, 0.999), "weight_decay": 0.01}
    assert "clip_grad" not in wrapper
    assert (config.train_cfg.max_iters, config.train_cfg.val_interval) == (160000, row.interval)
    assert (hooks.checkpoint.interval, hooks.checkpoint.by_epoch, hooks.logger.interval) == (4000, False, 50)
    assert hooks.checkpoint.get("save_best") == ("mIoU" if row.keeps_best else None)
    assert config.env_cfg.cudnn_benchmark


def test_stochastic_depth_on_the_command_line():
    path = str(CONFIGS / "segman_b_ade.py")
    args = TrainOptions.parse(
        [path, "--cfg-options", "randomness.seed=1", "--drop-path", "0.1", "--cfg-options", "x=1"]
    )
    assert args.cfg_options == ["randomness.seed=1", "model.backbone.drop_path_rate=0.1", "x=1"]
    assert load_config(path, args.cfg_options[:2]).model.backbone.drop_path_rate == 0.1
    assert TrainOptions.parse([path]).cfg_options == []


def test_several_processes_without_gpu():
    """Where batch norms cannot be synchronised."""
    config = load_config(CONFIGS / "segman_t_ade.py")
    config, sentences = for_machine(config, Group(Process(world_size=2, launcher="pytorch")))
    assert set(sentences) == {"no GPU: batch norms are not synchronised"}
    assert (config.get("sync_bn"), config.model.decode_head.norm_cfg.type) == (None, "BN")


def groups():
    """Learning rate and weight decay of each parameter of the tiny model."""
    config = resolved("segman_t_ade")
    model = built(config)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    return optimizer, {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
        for name in [next(name for name, other in model.named_parameters() if other is parameter)]
    }


def test_groups_of_the_optimizer():
    _, found = groups()
    for name, rates in found.items():
        if name.startswith("decode_head."):
            assert rates == (pytest.approx(6e-4), 0.01), name
        else:
            assert rates == (6e-5, 0.0 if "norm" in name else 0.01), name
    assert found["decode_head.vssm.norm1.weight"][1] == 0.01
    assert found["backbone.layers.0.blocks.0.token_mixer.norm.weight"][1] == 0
    assert found["backbone.layers.0.blocks.0.token_mixer.dwconv.1.weight"][1] == 0.01


def expected_factor(step):
    """Of the base rate, as the original's programs compute it: decay and warm-up multiplied."""
    warmup = 1 - (1 - step / 1500) * (1 - 1e-6) if step < 1500 else 1.0
    return (1 - step / 160000) * warmup


@pytest.mark.parametrize("start", [0, 1400, 80000, 159900])
def test_rates_of_each_iteration(start):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 6e-4}], lr=6e-5)
    schedulers = [
        PARAM_SCHEDULERS.build({**setting, "optimizer": optimizer})
        for setting in resolved("segman_t_ade").param_scheduler
    ]
    if start:
        for scheduler in schedulers:
            scheduler.last_step = scheduler._global_step = start
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * expected_factor(start)
    for step in range(start, min(start + 150, 160000)):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(group["initial_lr"] * expected_factor(step), rel=1e-9), step
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("name", OTHERS)
def test_other_configs(name):
    model = built(resolved(name)).eval()
    assert model.decode_head.num_classes == OTHERS[name]
    assert type(model.decode_head).__name__ == "SegMANDecoder"
    assert model(torch.empty(1, 3, 128, 128, device="meta")).shape == (1, OTHERS[name], 16, 16)


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.py")} == TABLE.keys() | OTHERS.keys()


def test_command_that_counts(capsys):
    from mambavision.openmmlab.complexity import count

    tool = load_program("semantic_segmentation/tools/flops.py")
    count(**vars(tool.options(["--config", str(CONFIGS / "segman_t_ade.py"), "--shape", "512", "512"])))
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert (lines["params"], lines["params decode_head"]) == ("6,397,260", "4,115,926")
    assert float(lines["GMACs"]) == pytest.approx(6.2, rel=0.05)  # published, with norms and interpolations
