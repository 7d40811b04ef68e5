"""The detection configs, resolved, against what the published detectors were trained with."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope
from torch import nn

from checkout import ROOT
from mambavision.openmmlab.config import load_config

CONFIGS = ROOT / "object_detection" / "configs"
MAMBA_VISION = {
    "tiny": {"dim": 80, "in_dim": 32, "depths": (1, 3, 8, 4), "layer_scale": None, "pretrained": "mamba_vision_T"},
    "small": {"dim": 96, "in_dim": 64, "depths": (3, 3, 7, 5), "layer_scale": None, "pretrained": "mamba_vision_S"},
    "base": {"dim": 128, "in_dim": 64, "depths": (3, 3, 10, 5), "layer_scale": 1e-5, "pretrained": "mamba_vision_B"},
}
PARAMETERS = {"tiny": (89_202_034, 31_154_368), "small": (107_482_034, 49_372_928), "base": (154_894_066, 96_662_080)}
VSSM_PARAMETERS = {
    "tiny": (49_755_312, 29_481_408),
    "tiny1": (50_212_080, 29_938_176),
    "small": (69_654_000, 49_380_096),
    "base": (107_931_376, 87_534_592),
}
SHORT_SIDES = [(side, 1333) for side in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
SCHEDULES = {"1x": (12, [8, 11]), "3x": (36, [27, 33])}


class Recipe(NamedTuple):
    """What differs between the published detectors."""

    width: int  # of the backbone's first stage
    schedule: str
    is_multi_scale: bool = True
    wrapper: str = "AmpOptimWrapper"
    lr: float = 1e-4


DETECTORS = {
    "mamba_vision/cascade_mask_rcnn_mamba_vision_tiny_3x_coco": Recipe(80, "3x"),
    "mamba_vision/cascade_mask_rcnn_mamba_vision_small_3x_coco": Recipe(96, "3x"),
    "mamba_vision/cascade_mask_rcnn_mamba_vision_base_3x_coco": Recipe(128, "3x", lr=2e-4),
    **{
        f"vmamba/mask_rcnn_vssm_fpn_coco_{size}": Recipe(width, "1x", False, "OptimWrapper")
        for size, width in (("tiny", 96), ("tiny1", 96), ("small", 96), ("base", 128))
    },
    **{
        f"vmamba/mask_rcnn_vssm_fpn_coco_{size}_ms_3x": Recipe(96, "3x", True, "OptimWrapper")
        for size in ("tiny", "tiny1", "small")
    },
}


@cache
def resolved(name):
    return load_config(CONFIGS / f"{name}.py")


def built(config):
    """Without memory for the weights."""
    with DefaultScope.overwrite_default_scope("mmdet"), torch.device("meta"):
        return MODELS.build(config.model)


@pytest.fixture(params=DETECTORS)
def name(request):
    return request.param


@pytest.fixture
def recipe(name):
    return DETECTORS[name]


@pytest.fixture
def config(name):
    return resolved(name)


@pytest.fixture(params=MAMBA_VISION)
def size(request):
    return request.param


@pytest.fixture
def cascade(size):
    return resolved(f"mamba_vision/cascade_mask_rcnn_mamba_vision_{size}_3x_coco")


def test_backbone(cascade, size):
    backbone = cascade.model.backbone
    assert backbone.type == "MM_mamba_vision"
    assert {key: backbone.get(key) for key in MAMBA_VISION[size]} == MAMBA_VISION[size]
    assert backbone.num_heads == (2, 4, 8, 16)
    assert backbone.window_size == (8, 8, 112, 56)
    # The published configs say 0.2, 0.3 and 0.5, but the wrapper they were trained with has 0.2 in any case.
    assert backbone.drop_path_rate == 0.2
    # Nothing is frozen and batch norms train, though the published configs inherit a ResNet's settings.
    assert not {"frozen_stages", "norm_eval", "init_cfg", "depth"} & backbone.keys()


def test_every_vssm_config_is_tested():
    tested = {name for name in DETECTORS if name.startswith("vmamba/")}
    assert {f"vmamba/{path.stem}" for path in CONFIGS.glob("vmamba/*.py")} == {*tested, "vmamba/mask_rcnn_vssm_digits"}


def test_digits():
    plain, vssm = (
        resolved(name) for name in ("mamba_vision/mask_rcnn_mamba_vision_digits", "vmamba/mask_rcnn_vssm_digits")
    )
    assert {key for key in plain if plain[key] != vssm[key]} == {"model"}
    assert {key for key in plain.model if plain.model[key] != vssm.model[key]} == {"backbone"}
    assert [level["num_chs"] for level in built(vssm).backbone.feature_info] == vssm.model.neck.in_channels


def test_detector(config, recipe):
    model = config.model
    preprocessor = model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]
    assert (preprocessor.bgr_to_rgb, preprocessor.pad_mask, preprocessor.pad_size_divisor) == (True, True, 32)
    assert model.neck.in_channels == [recipe.width * 2**stage for stage in range(4)]
    assert (model.neck.type, model.neck.out_channels, model.neck.num_outs) == ("FPN", 256, 5)
    rpn = model.rpn_head
    anchors = rpn.anchor_generator
    assert (anchors.scales, anchors.ratios, anchors.strides) == ([8], [0.5, 1.0, 2.0], [4, 8, 16, 32, 64])
    assert rpn.bbox_coder.target_stds == [1.0] * 4
    assert rpn.loss_cls == {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0}


def test_heads_of_cascade(cascade):
    assert cascade.model.type == "CascadeRCNN"
    assert cascade.model.rpn_head.loss_bbox == {"type": "SmoothL1Loss", "beta": 1 / 9, "loss_weight": 1.0}
    head = cascade.model.roi_head
    assert (head.type, head.num_stages, head.stage_loss_weights) == ("CascadeRoIHead", 3, [1, 0.5, 0.25])
    stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    for stage, expected in zip(head.bbox_head, stds, strict=True):
        assert stage.bbox_coder.target_stds == expected
        assert stage.type == "ConvFCBBoxHead"
        assert (stage.num_shared_convs, stage.num_shared_fcs, stage.conv_out_channels, stage.fc_out_channels) == (
            4, 1, 256, 1024
        )  # fmt: skip
        assert (stage.num_classes, stage.reg_class_agnostic, stage.reg_decoded_bbox) == (80, False, True)
        assert stage.norm_cfg == {"type": "SyncBN", "requires_grad": True}
        assert stage.loss_cls == {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
        assert stage.loss_bbox == {"type": "GIoULoss", "loss_weight": 10.0}


def test_heads_of_mask_rcnn():
    model = resolved("vmamba/mask_rcnn_vssm_fpn_coco_tiny").model
    assert (model.type, model.roi_head.type) == ("MaskRCNN", "StandardRoIHead")
    head = model.roi_head.bbox_head
    assert (head.type, head.fc_out_channels, head.num_classes) == ("Shared2FCBBoxHead", 1024, 80)
    assert head.bbox_coder.target_stds == [0.1, 0.1, 0.2, 0.2]
    assert head.reg_class_agnostic is False
    assert head.loss_cls == {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
    assert head.loss_bbox == model.rpn_head.loss_bbox == {"type": "L1Loss", "loss_weight": 1.0}


def test_regions_and_masks(config):
    head = config.model.roi_head
    for extractor, cells in ((head.bbox_roi_extractor, 7), (head.mask_roi_extractor, 14)):
        assert extractor.roi_layer == {"type": "RoIAlign", "output_size": cells, "sampling_ratio": 0}
        assert extractor.featmap_strides == [4, 8, 16, 32]
    mask = head.mask_head
    assert (mask.type, mask.num_convs, mask.conv_out_channels, mask.num_classes) == ("FCNMaskHead", 4, 256, 80)
    assert mask.loss_mask == {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0}


def test_assignment_and_selection(config):
    train, test = config.model.train_cfg, config.model.test_cfg
    is_cascade = config.model.type == "CascadeRCNN"
    assigner = train.rpn.assigner
    assert (assigner.pos_iou_thr, assigner.neg_iou_thr, assigner.min_pos_iou, assigner.match_low_quality) == (
        0.7, 0.3, 0.3, True
    )  # fmt: skip
    assert (train.rpn.sampler.num, train.rpn.sampler.pos_fraction) == (256, 0.5)
    proposals = train.rpn_proposal
    kept = 2000 if is_cascade else 1000
    assert (proposals.nms_pre, proposals.max_per_img, proposals.nms.iou_threshold) == (2000, kept, 0.7)
    stages, thresholds = (train.rcnn, (0.5, 0.6, 0.7)) if is_cascade else ([train.rcnn], (0.5,))
    for stage, threshold in zip(stages, thresholds, strict=True):
        assert {stage.assigner[key] for key in ("pos_iou_thr", "neg_iou_thr", "min_pos_iou")} == {threshold}
        assert (stage.sampler.num, stage.sampler.pos_fraction, stage.sampler.add_gt_as_proposals) == (512, 0.25, True)
        assert stage.mask_size == 28
    assert (test.rpn.nms_pre, test.rpn.max_per_img, test.rpn.nms.iou_threshold) == (1000, 1000, 0.7)
    rcnn = test.rcnn
    assert (rcnn.score_thr, rcnn.nms.iou_threshold, rcnn.max_per_img, rcnn.mask_thr_binary) == (0.05, 0.5, 100, 0.5)


def test_data(config, recipe):
    train, val = config.train_dataloader, config.val_dataloader
    assert (train.batch_size, train.num_workers, val.batch_size) == (2, 2, 1)
    assert train.batch_sampler.type == "AspectRatioBatchSampler"
    assert train.dataset.filter_cfg == {"filter_empty_gt": True, "min_size": 32}
    for loader, split in ((train, "train"), (val, "val"), (config.test_dataloader, "val")):
        assert loader.dataset.data_root == "data/coco"
        assert loader.dataset.ann_file == f"annotations/instances_{split}2017.json"
        assert loader.dataset.data_prefix.img == f"{split}2017/"
    for evaluator in (config.val_evaluator, config.test_evaluator):
        assert evaluator.ann_file == "data/coco/annotations/instances_val2017.json"
        assert evaluator.metric == ["bbox", "segm"]
    whole = {"type": "Resize", "scale": (1333, 800), "keep_ratio": True}
    assert whole in val.dataset.pipeline
    load, annotate, *middle, pack = train.dataset.pipeline
    assert [step.type for step in (load, annotate, pack)] == ["LoadImageFromFile", "LoadAnnotations", "PackDetInputs"]
    assert (annotate.with_bbox, annotate.with_mask) == (True, True)
    flip = {"type": "RandomFlip", "prob": 0.5}
    if not recipe.is_multi_scale:
        assert middle == [whole, flip]
        return
    first, choice = middle
    assert first == flip
    (resize,), (first, crop, again) = choice.transforms
    assert choice.type == "RandomChoice"
    for step, scales in ((resize, SHORT_SIDES), (first, [(400, 1333), (500, 1333), (600, 1333)]), (again, SHORT_SIDES)):
        assert step == {"type": "RandomChoiceResize", "scales": scales, "keep_ratio": True}
    assert crop == {
        "type": "RandomCrop", "crop_type": "absolute_range", "crop_size": (384, 600), "allow_negative_crop": True
    }  # fmt: skip


def test_data_root_is_one_variable(monkeypatch):
    monkeypatch.setenv("COCO_ROOT", "/somewhere/coco")
    config = resolved.__wrapped__("mamba_vision/cascade_mask_rcnn_mamba_vision_tiny_3x_coco")
    roots = {config[f"{part}_dataloader"].dataset.data_root for part in ("train", "val", "test")}
    assert roots == {"/somewhere/coco"}
    assert config.val_evaluator.ann_file == config.test_evaluator.ann_file
    assert config.val_evaluator.ann_file == "/somewhere/coco/annotations/instances_val2017.json"


def test_schedule(config, recipe):
    epochs, milestones = SCHEDULES[recipe.schedule]
    wrapper = config.optim_wrapper
    assert wrapper.type == recipe.wrapper
    assert wrapper.optimizer == {"type": "AdamW", "lr": recipe.lr, "betas": (0.9, 0.999), "weight_decay": 0.05}
    assert wrapper.paramwise_cfg.custom_keys == {"norm": {"decay_mult": 0.0}}
    warmup, steps = config.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.begin, warmup.end, warmup.by_epoch) == (
        "LinearLR", 1e-3, 0, 1000, False
    )  # fmt: skip
    assert (steps.type, steps.begin, steps.end, steps.milestones) == ("MultiStepLR", 0, epochs, milestones)
    assert (steps.by_epoch, steps.gamma) == (True, 0.1)
    assert (config.train_cfg.max_epochs, config.train_cfg.val_interval) == (epochs, 1)
    assert config.auto_scale_lr == {"enable": False, "base_batch_size": 16}


def test_runtime(config):
    assert config.default_scope == "mmdet"
    assert config.default_hooks.logger.interval == 50
    hook = config.default_hooks.checkpoint
    assert (hook.type, hook.interval) == ("SafeCheckpointHook", 1)
    assert config.env_cfg.cudnn_benchmark is False
    assert config.env_cfg.mp_cfg.mp_start_method == "fork"
    assert config.env_cfg.dist_cfg.backend == "nccl"


def test_parameters(cascade, size):
    model = built(cascade)
    total, backbone = PARAMETERS[size]
    assert _count(model) == total
    assert _count(model.backbone) == backbone
    assert _count(model.rpn_head) == 593_935
    assert {_count(head) for head in model.roi_head.bbox_head} == {15_618_449}
    assert {_count(head) for head in model.roi_head.mask_head} == {2_643_280}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", VSSM_PARAMETERS)
def test_parameters_with_vssm(size):
    model = built(resolved(f"vmamba/mask_rcnn_vssm_fpn_coco_{size}"))
    assert (_count(model), _count(model.backbone)) == VSSM_PARAMETERS[size]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("mamba_vision/mask_rcnn_*_coco.py")), ids=lambda path: path.stem)
def test_mask_rcnn(path):
    config = load_config(path)
    *_, size, schedule, _ = path.stem.split("_")
    assert {key: config.model.backbone.get(key) for key in MAMBA_VISION[size]} == MAMBA_VISION[size]
    epochs, milestones = SCHEDULES[schedule]
    assert config.train_cfg.max_epochs == epochs
    assert config.param_scheduler[1].end == epochs
    assert config.param_scheduler[1].milestones == milestones
    model = built(config)
    assert type(model).__name__ == "MaskRCNN"
    assert _count(model.backbone) == PARAMETERS[size][1]


def test_own_data(monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/somewhere/pets")
    config = resolved.__wrapped__("mamba_vision/mask_rcnn_mamba_vision_tiny_own_data")
    for part, split in (("train", "train"), ("val", "val"), ("test", "val")):
        dataset = config[f"{part}_dataloader"].dataset
        assert dataset.metainfo.classes == ("cat", "dog")
        assert (dataset.data_root, dataset.ann_file) == ("/somewhere/pets", f"annotations/{split}.json")
        assert dataset.data_prefix.img == f"{split}/"
    assert config.val_evaluator.ann_file == config.test_evaluator.ann_file == "/somewhere/pets/annotations/val.json"
    assert config.model.roi_head.bbox_head.num_classes == config.model.roi_head.mask_head.num_classes == 2
