"""Segmentation: its checks of the data, and its steps from config to config."""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from mmengine import Config

from mambavision.errors import UserError
from mambavision.files import check_writable
from mambavision.openmmlab.config import pipeline_owner, settings_in
from mambavision.openmmlab.data.masks import number_of_classes
from mambavision.openmmlab.data.segmentation import check_datasets
from mambavision.openmmlab.training.task import Task, check_metrics
from mambavision.running.process import this_process

_logger = logging.getLogger(__name__)

_POOLING_HEADS = ("UPerHead", "PSPHead", "SegMANDecoder")  # they normalise single pixels


def check_masks_while_loading(config: Config) -> Config:
    """Check every mask that the data loaders read, so that errors name the file."""
    num_classes, ignored = number_of_classes(config)
    for key in ("train_dataloader", "val_dataloader", "test_dataloader", "tta_pipeline"):
        for setting in settings_in(config.get(key)):
            if setting.get("type") == "LoadAnnotations":
                setting.update(type="LoadCheckedAnnotations", num_classes=num_classes, ignored=ignored)
    return config


def use_two_images(config: Config) -> Config:
    """Use batches of at least two images where batch norms of pooled maps are not synchronised; check the rate."""
    process, loader = this_process(), config.train_dataloader
    pools = any(setting.get("type") in _POOLING_HEADS for setting in settings_in(config.model))
    is_synchronised = process.is_distributed and torch.cuda.is_available()
    if pools and loader.batch_size == 1 and not is_synchronised:
        loader.batch_size = 2
        _logger.warning("one process or no GPU: batches of 2 images instead of 1, for the batch norms of pooled maps")
    total, scaling = loader.batch_size * process.world_size, config.get("auto_scale_lr", {})
    if scaling.get("base_batch_size", total) != total and not scaling.get("enable"):
        _logger.warning(
            "the global batch has %d images, but the learning rate is for %d: set train_dataloader.batch_size, or give "
            "--auto-scale-lr",
            total,
            scaling.base_batch_size,
        )
    return config


def set_iou_metrics(config: Config, metrics: Sequence[str] | None, folder: str | None) -> Config:
    """Compute other metrics than the config's (``--eval``), and write the predicted masks (``--out``)."""
    check_metrics(metrics, ("mIoU", "mDice", "mFscore"))
    evaluators = [found for found in settings_in(config.test_evaluator) if found.get("type") == "IoUMetric"]
    if (metrics or folder) and not evaluators:
        raise UserError(f"--eval and --out: {config.filename} has no IoUMetric in test_evaluator.")
    for evaluator in evaluators:
        evaluator.update({"iou_metrics": list(metrics)} if metrics else {})
        evaluator.update({"output_dir": folder} if folder else {})
    if folder:
        check_writable(f"{folder}/mask.png")
    return config


def draw_segmentations(config: Config, folder: str | None) -> Config:
    """Write every picture, not some of them, and to a given folder (``--show-dir``)."""
    if folder:
        config.visualizer.save_dir = folder
    for hook in settings_in(config.default_hooks):
        if hook.get("type") == "SegVisualizationHook":
            hook.interval = 1
    return config


def augment_segmentation(config: Config, enabled: bool) -> Config:
    """Average over scales and mirror images (``--tta``)."""
    if enabled:
        if "tta_pipeline" not in config:
            raise UserError(f"--tta: {config.filename} has no tta_pipeline, which defines the views of an image.")
        pipeline_owner(config).pipeline = config.tta_pipeline
        config.model = {**config.get("tta_model", {"type": "SegTTAModel"}), "module": config.model}
    return config


SEGMENTATION = Task(
    check_training_data=check_datasets,
    check_test_data=partial(check_datasets, splits=("test",)),
    training_steps=(check_masks_while_loading, use_two_images),
    test_steps=lambda options: (
        check_masks_while_loading,
        partial(set_iou_metrics, metrics=options.eval, folder=options.out),
        partial(draw_segmentations, folder=options.show_dir),
        partial(augment_segmentation, enabled=options.tta),
    ),
)
