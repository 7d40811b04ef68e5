"""Detection of objects in images and videos."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmdet.structures import DetDataSample
from mmdet.structures.mask import encode_mask_results
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mambavision.errors import CheckpointError, UserError
from mambavision.files import check_writable, replacing
from mambavision.openmmlab.checkpoints import load_from_local
from mambavision.openmmlab.config import explained, load_config
from mambavision.openmmlab.data.coco import dataset_meta, head_classes
from mambavision.openmmlab.logs import start_logging
from mambavision.openmmlab.prediction.pictures import Pictures
from mambavision.openmmlab.prediction.sources import Frame, Preparation, find_sources, in_batches, read_frames
from mambavision.openmmlab.weights import trained_model
from mambavision.running.process import pick_device, this_process
from mambavision.running.progress import progress
from mambavision.text import as_json, escaped

_logger = logging.getLogger(__name__)

RESULTS = "predictions.json"
# Numbers of COCO's categories in its annotation files and its evaluation.
_UNUSED_BY_COCO = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_COCO_NUMBERS = [number for number in range(1, 91) if number not in _UNUSED_BY_COCO]


def detect(
    inputs: Sequence[str],
    config: str,
    checkpoint: str,
    out: str | Path,
    score_threshold: float,
    pictures: bool,
    device: str,
    batch_size: int,
    cfg_options: Sequence[str],
) -> None:
    """Detect objects in images and videos; write pictures and predictions.json, all or nothing.

    Args:
        inputs: Images, videos, folders and patterns.
        config: Config file of the detector.
        checkpoint: Its weights.
        out: Output folder.
        score_threshold: Ignore objects with lower scores.
        pictures: Write pictures as well.
        device: Name of the device; empty for a GPU if there is one.
        batch_size: Images per batch.
        cfg_options: Settings that override the config.
    """
    start_logging()
    target, out = pick_device(device, this_process()), Path(out)
    check_writable(out / RESULTS)
    cfg = load_config(config, cfg_options)
    content = load_from_local(checkpoint)
    sources = find_sources(inputs, out)
    drawn = Pictures(out, sources) if pictures else None
    detector = Detector(cfg, content, checkpoint, target)
    detector.prepare.check(sources)

    results = Results(detector.classes)
    count = sum(source.length for source in sources)
    with drawn or contextlib.nullcontext(), progress("detecting", count) as line:
        for frames in in_batches(read_frames(sources), batch_size):
            for frame, sample in zip(frames, detector.detect(frames, score_threshold), strict=True):
                results.add(frame, sample)
                if drawn is not None:
                    drawn.add(frame, detector.draw(frame, sample))
            line.step(count=len(frames))
        if drawn is not None:
            drawn.finish()
        with replacing(out / RESULTS) as file:  # if it fails, no pictures appear either
            file.write(as_json(results.content, indent=None).encode())
    found, images = len(results.content["annotations"]), len(results.content["images"])
    _logger.info("%d objects in %d images or frames, written to %s", found, images, out)


class Detector:
    """A detector with trained weights, which also draws its detections.

    Args:
        cfg: Config of the detector.
        checkpoint: Content of its checkpoint.
        path: Name of the checkpoint in error messages.
        device: Device of the model.

    Raises:
        CheckpointError: The checkpoint belongs to another model.
    """

    def __init__(self, cfg: Config, checkpoint: dict[str, Any], path: str, device: torch.device) -> None:
        if "model" not in cfg:
            raise UserError(f"{cfg.filename}: has no model; give the config of a detector.")
        cfg.setdefault("default_scope", "mmdet")
        init_default_scope(cfg.default_scope)
        with explained(cfg.filename):
            self.prepare = Preparation(cfg)
            meta = _meta(cfg, checkpoint, path)
        self._model = trained_model(cfg, checkpoint, path, device)
        self.classes: list[str] = list(meta["classes"])
        self._visualizer = DetLocalVisualizer(alpha=0.5)
        palette = meta.get("palette")
        enough = isinstance(palette, (list, tuple)) and len(palette) >= len(self.classes)
        # The names are drawn by Matplotlib, where a dollar sign starts a formula.
        shown = [escaped(name).replace("$", r"\$") for name in self.classes]
        self._visualizer.dataset_meta = {"classes": shown, "palette": palette if enough else "random"}

    def detect(self, frames: list[Frame], threshold: float) -> list[DetDataSample]:
        """Return the objects in each image whose score is at least `threshold`, on the CPU."""
        prepared = [self.prepare(frame) for frame in frames]
        with torch.inference_mode():
            samples = self._model.test_step({key: [each[key] for each in prepared] for key in prepared[0]})
        for sample in samples:
            found = sample.pred_instances
            sample.pred_instances = found[found.scores >= threshold].cpu()
        return samples

    def draw(self, frame: Frame, sample: DetDataSample) -> np.ndarray:
        """Return the image with boxes, masks, names and scores on it."""
        rgb = frame.image[..., ::-1].copy()
        self._visualizer.add_datasample("", rgb, sample, draw_gt=False, pred_score_thr=-1.0)
        return self._visualizer.get_image()[..., ::-1].copy()


def _meta(cfg: Config, checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
    """Return classes and palette of the checkpoint or, if it has none, of the config."""
    kept = checkpoint.get("meta", {})
    kept = {key.lower(): value for key, value in {**kept, **kept.get("dataset_meta", {})}.items()}
    error: type[UserError]
    if kept.get("classes"):
        origin, error, meta = path, CheckpointError, kept
    else:
        origin, error, meta = cfg.filename, UserError, dataset_meta(cfg.get("test_dataloader", {}).get("dataset", {}))
    count, heads = len(meta.get("classes", ())), head_classes(cfg.model)
    if heads and heads != {count}:
        raise error(
            f"{origin}: names {count} classes, but the heads of {cfg.filename} have {_listed(heads)} (num_classes); "
            "give the config that the checkpoint was trained with."
        )
    return meta


def _listed(numbers: set[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))


class Results:
    """All detections in the format of COCO's annotation files and results.

    ``images`` maps each image_id to a file, or to a frame of a video; ``annotations`` are entries of COCO's results
    format, complete enough for pycocotools to load the whole as an annotation file.
    """

    def __init__(self, classes: list[str]) -> None:
        is_coco = classes == list(CocoDataset.METAINFO["classes"])
        self._numbers = _COCO_NUMBERS if is_coco else range(1, len(classes) + 1)
        categories = [{"id": number, "name": name} for number, name in zip(self._numbers, classes, strict=True)]
        self.content: dict[str, list] = {"images": [], "categories": categories, "annotations": []}

    def add(self, frame: Frame, sample: DetDataSample) -> None:
        height, width = frame.image.shape[:2]
        images, annotations = self.content["images"], self.content["annotations"]
        image = {"id": len(images) + 1, "file_name": str(frame.source.path), "width": width, "height": height}
        images.append(image | ({"frame": frame.index} if frame.source.is_video else {}))
        found = sample.pred_instances
        masks = encode_mask_results(found.masks.numpy()) if "masks" in found else [None] * len(found)
        for box, label, score, mask in zip(
            found.bboxes.tolist(), found.labels.tolist(), found.scores.tolist(), masks, strict=True
        ):
            x, y, right, bottom = box
            entry = {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": self._numbers[label],
                "bbox": [round(value, 2) for value in (x, y, right - x, bottom - y)],
                "score": round(score, 5),
                "area": round((right - x) * (bottom - y), 2),
                "iscrowd": 0,
            }
            if mask is not None:
                entry["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode()}
            annotations.append(entry)
