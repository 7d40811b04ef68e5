"""Detect objects in images and videos; see README.md and --help."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.config import Config

    from mambavision.openmmlab.prediction.sources import Frame

RESULTS = "predictions.json"
# The categories of COCO have these numbers in its annotation files, by which its evaluation knows them.
_UNUSED_BY_COCO = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_COCO_NUMBERS = [number for number in range(1, 91) if number not in _UNUSED_BY_COCO]


def main() -> None:
    args = options()  # before the slow imports: a mistyped flag answers at once

    from mambavision.running.program import run_cli

    run_cli(lambda: predict(args))


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Detect objects; writes pictures, videos and {RESULTS} in COCO's format, all or nothing."
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, video, folder of them, or pattern such as 'photos/*.jpg'")
    add("--config", required=True, metavar="FILE", help="config of the detector")
    add("--checkpoint", required=True, metavar="FILE", help="its trained weights")
    add("--out", default="predictions", metavar="DIR", help="folder to write to (default: %(default)s)")
    add("--score-threshold", type=float, default=0.3, help="leave out less certain objects (default: %(default)s)")
    add("--no-pictures", action="store_true", help=f"write {RESULTS} alone")
    add("--device", default="", help="cuda, cpu, ...; default: a GPU if there is one")
    add("--batch-size", type=int, default=1, help="images at a time (default: %(default)s)")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the config")
    return parser.parse_args(argv)


def predict(args: argparse.Namespace) -> None:
    """Detect objects in all inputs and write what was found to --out."""
    import logging

    from mambavision.files import check_writable, replacing
    from mambavision.openmmlab.checkpoints import load_from_local
    from mambavision.openmmlab.config import load_config
    from mambavision.openmmlab.prediction.sources import find_sources, in_batches, read_frames
    from mambavision.openmmlab.prediction.pictures import Pictures
    from mambavision.openmmlab.reporting import progress, start_logging
    from mambavision.running.process import pick_device, this_process
    from mambavision.running.ranges import check_ranges
    from mambavision.text import as_json

    check_ranges(vars(args))
    start_logging()
    device = pick_device(args.device, this_process())
    out = Path(args.out)
    check_writable(out / RESULTS)
    cfg = load_config(args.config, args.cfg_options)
    checkpoint = load_from_local(args.checkpoint)
    sources = find_sources(args.inputs, out)
    pictures = None if args.no_pictures else Pictures(out, sources)
    detector = Detector(cfg, checkpoint, args.checkpoint, device)
    detector.prepare.check(sources)

    results = Results(detector.classes)
    count = sum(source.length for source in sources)
    with pictures or contextlib.nullcontext(), progress("detecting", count) as advance:
        for frames in in_batches(read_frames(sources), args.batch_size):
            for frame, sample in zip(frames, detector.detect(frames, args.score_threshold), strict=True):
                results.add(frame, sample)
                if pictures is not None:
                    pictures.add(frame, detector.draw(frame, sample))
            advance(len(frames))
        if pictures is not None:
            pictures.finish()
        with replacing(out / RESULTS) as file:  # if it fails, the pictures do not appear either
            file.write(as_json(results.content, indent=None).encode())
    found, images = len(results.content["annotations"]), len(results.content["images"])
    logging.getLogger(__name__).info("%d objects in %d images or frames, written to %s", found, images, out)


class Detector:
    """A detector with trained weights, which marks what it finds in pictures.

    Args:
        cfg: Its config.
        checkpoint: Content of a checkpoint of it.
        path: Where the checkpoint comes from, for messages.
        device: Where it runs.

    Raises:
        CheckpointError: The checkpoint is of another model.
    """

    def __init__(self, cfg: "Config", checkpoint: dict[str, Any], path: str, device: "torch.device") -> None:
        from mmdet.visualization import DetLocalVisualizer
        from mmengine.registry import init_default_scope

        from mambavision.errors import UserError
        from mambavision.openmmlab.config import explained
        from mambavision.openmmlab.prediction.sources import Preparation
        from mambavision.openmmlab.weights import trained_model
        from mambavision.text import escaped

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
        # Matplotlib, which writes the names, takes a dollar for the beginning of mathematics.
        shown = [escaped(name).replace("$", r"\$") for name in self.classes]
        self._visualizer.dataset_meta = {"classes": shown, "palette": palette if enough else "random"}

    def detect(self, frames: list["Frame"], threshold: float) -> list["DetDataSample"]:
        """Return what each image shows with at least this score, on the CPU."""
        import torch

        prepared = [self.prepare(frame) for frame in frames]
        with torch.inference_mode():
            samples = self._model.test_step({key: [each[key] for each in prepared] for key in prepared[0]})
        for sample in samples:
            found = sample.pred_instances
            sample.pred_instances = found[found.scores >= threshold].cpu()
        return samples

    def draw(self, frame: "Frame", sample: "DetDataSample") -> "np.ndarray":
        """Return the image with boxes, masks, names and scores on it."""
        rgb = frame.image[..., ::-1].copy()
        self._visualizer.add_datasample("", rgb, sample, draw_gt=False, pred_score_thr=-1.0)
        return self._visualizer.get_image()[..., ::-1].copy()


def _meta(cfg: "Config", checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
    """Return classes and palette: those the checkpoint was trained with or, where it keeps none, the config's."""
    from mambavision.errors import CheckpointError, UserError
    from mambavision.openmmlab.data.coco import dataset_meta, head_classes

    kept = checkpoint.get("meta", {})
    kept = {key.lower(): value for key, value in {**kept, **kept.get("dataset_meta", {})}.items()}
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
    """All that was found, as COCO's annotation files and results have it.

    ``images`` says which file, and which frame of a video, an image_id is; ``annotations`` are entries of COCO's
    results format, complete enough for pycocotools to load the whole as an annotation file.
    """

    def __init__(self, classes: list[str]) -> None:
        from mmdet.datasets import CocoDataset

        is_coco = classes == list(CocoDataset.METAINFO["classes"])
        self._numbers = _COCO_NUMBERS if is_coco else range(1, len(classes) + 1)
        categories = [{"id": number, "name": name} for number, name in zip(self._numbers, classes, strict=True)]
        self.content: dict[str, list] = {"images": [], "categories": categories, "annotations": []}

    def add(self, frame: "Frame", sample: "DetDataSample") -> None:
        from mmdet.structures.mask import encode_mask_results

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


if __name__ == "__main__":
    main()
