"""Segmentation of images and videos."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from mmengine import Config
from mmengine.registry import init_default_scope

from mambavision.errors import CheckpointError
from mambavision.files import check_writable
from mambavision.openmmlab.checkpoints import load_from_local
from mambavision.openmmlab.config import explained, load_config
from mambavision.openmmlab.data.masks import number_of_classes
from mambavision.openmmlab.data.segmentation import build_dataset
from mambavision.openmmlab.logs import start_logging
from mambavision.openmmlab.prediction.overlay import Overlay
from mambavision.openmmlab.prediction.pictures import Pictures
from mambavision.openmmlab.prediction.sources import Frame, Preparation, Source, find_sources, read_frames
from mambavision.openmmlab.weights import trained_model
from mambavision.running.process import pick_device, this_process
from mambavision.running.progress import progress

_logger = logging.getLogger(__name__)

MASKS = "masks"


def segment(
    inputs: Sequence[str],
    config: str,
    checkpoint: str,
    out: str | Path,
    opacity: float,
    device: str,
    cfg_options: Sequence[str],
) -> None:
    """Segment images and videos; write coloured pictures and, below masks/, the class of each pixel; all or nothing.

    Args:
        inputs: Images, videos, folders and patterns.
        config: Config file of the model.
        checkpoint: Its weights.
        out: Output folder.
        opacity: Opacity of the colours, from 0 to 1.
        device: Name of the device; empty for a GPU if there is one.
        cfg_options: Settings that override the config.
    """
    start_logging()
    target, out = pick_device(device, this_process()), Path(out)
    check_writable(out / "mask.png")
    cfg = load_config(config, cfg_options)
    content = load_from_local(checkpoint)
    sources = find_sources(inputs, out)
    pictures = Pictures(out, sources)
    segmenter = Segmenter(cfg, content, checkpoint, target)
    segmenter.prepare.check(sources)
    overlay = Overlay(segmenter.classes, segmenter.palette, opacity)

    with pictures, progress("segmenting", sum(source.length for source in sources)) as line:
        for frame in read_frames(sources):
            mask = segmenter.segment(frame)
            pictures.add(frame, overlay.draw(frame.image, mask))
            pictures.add(replace(frame, source=mask_of(frame.source, frame.index)), mask)
            line.step()
    _logger.info("%d images or videos, written to %s", len(sources), out)


def mask_of(source: Source, index: int) -> Source:
    """Return the source with the output path of the mask of an image or of a frame of a video."""
    result = PurePath(MASKS, source.result)
    if source.is_video:
        result = result.with_suffix("") / f"{index:06d}.png"
    elif result.suffix != ".png":
        result = PurePath(f"{result}.png")
    return replace(source, result=result, length=1, fps=None)


class Segmenter:
    """A segmentation model with trained weights.

    Args:
        config: Config of the model.
        checkpoint: Content of its checkpoint.
        path: Name of the checkpoint in error messages.
        device: Device of the model.

    Attributes:
        classes: Names of the classes.
        palette: Red, green and blue of each class, 0 to 255.

    Raises:
        CheckpointError: The checkpoint belongs to another model.
        UserError: The config is inconsistent.
    """

    def __init__(self, config: Config, checkpoint: dict[str, Any], path: str, device: torch.device) -> None:
        init_default_scope(config.default_scope)
        with explained(config.filename):
            self.prepare = Preparation(config)
            self.classes, self.palette = _classes(config, checkpoint, path)
        self._model = trained_model(config, checkpoint, path, device)

    def segment(self, frame: Frame) -> np.ndarray:
        """Return the class of each pixel, (H, W) uint8."""
        prepared = self.prepare(frame)
        with torch.inference_mode():
            sample = self._model.test_step({key: [value] for key, value in prepared.items()})[0]
        return sample.pred_sem_seg.data[0].to(torch.uint8).cpu().numpy()


def _classes(config: Config, checkpoint: dict[str, Any], path: str) -> tuple[list[str], list[list[int]]]:
    """Return names and colours of the checkpoint or, if it has none, of the config."""
    kept = checkpoint.get("meta", {}).get("dataset_meta") or {}
    if not kept.get("classes"):
        kept = build_dataset(config.test_dataloader.dataset, config, lazy_init=True).metainfo
    names, known = list(kept["classes"]), number_of_classes(config)[0]
    if len(names) != known:
        raise CheckpointError(
            f"{path}: names {len(names)} classes, but the model of {config.filename} has {known} (num_classes); give "
            "the config that the checkpoint was trained with."
        )
    palette = kept.get("palette") or []
    if len(palette) != len(names):
        raise CheckpointError(f"{path}: names {len(names)} classes and {len(palette)} colours (dataset_meta.palette).")
    return names, [list(colour) for colour in palette]
