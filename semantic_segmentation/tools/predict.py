"""Segment images and videos; see README.md and --help."""

import argparse
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from mmengine import Config

    from mambavision.openmmlab.prediction.sources import Frame, Source

MASKS = "masks"


def main() -> None:
    args = options()  # before the slow imports: a mistyped flag answers at once

    from mambavision.running.program import run_cli

    run_cli(lambda: predict(args))


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Segment images; writes coloured pictures and videos with a legend and, "
        f"below {MASKS}/, the number of each pixel's class from 0 on as PNG; all or nothing."
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, video, folder of them, or pattern such as 'photos/*.jpg'")
    add("--config", required=True, metavar="FILE", help="config of the model")
    add("--checkpoint", required=True, metavar="FILE", help="its trained weights")
    add("--out", default="predictions", metavar="DIR", help="folder to write to (default: %(default)s)")
    add("--opacity", type=float, default=0.5, help="of the colours, from 0 to 1 (default: %(default)s)")
    add("--device", default="", help="cuda, cpu, ...; default: a GPU if there is one")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings to override")
    return parser.parse_args(argv)


def predict(args: argparse.Namespace) -> None:
    """Segment all inputs and write what was found to --out."""
    import logging

    from mambavision.openmmlab.prediction.overlay import Overlay

    from mambavision.files import check_writable
    from mambavision.openmmlab.checkpoints import load_from_local
    from mambavision.openmmlab.config import load_config
    from mambavision.openmmlab.prediction.sources import find_sources, read_frames
    from mambavision.openmmlab.prediction.pictures import Pictures
    from mambavision.openmmlab.reporting import progress, start_logging
    from mambavision.running.process import pick_device, this_process
    from mambavision.running.ranges import check_ranges

    check_ranges(vars(args))
    start_logging()
    device = pick_device(args.device, this_process())
    out = Path(args.out)
    check_writable(out / "mask.png")
    config = load_config(args.config, args.cfg_options)
    checkpoint = load_from_local(args.checkpoint)
    sources = find_sources(args.inputs, out)
    pictures = Pictures(out, sources)
    segmenter = Segmenter(config, checkpoint, args.checkpoint, device)
    segmenter.prepare.check(sources)
    overlay = Overlay(segmenter.classes, segmenter.palette, args.opacity)

    with pictures, progress("segmenting", sum(source.length for source in sources)) as advance:
        for frame in read_frames(sources):
            mask = segmenter.segment(frame)
            pictures.add(frame, overlay.draw(frame.image, mask))
            pictures.add(replace(frame, source=mask_of(frame.source, frame.index)), mask)
            advance(1)
    logging.getLogger(__name__).info("%d images or videos, written to %s", len(sources), out)


def mask_of(source: "Source", index: int) -> "Source":
    """Say where the mask of an image belongs, or that of a video's frame of this index."""
    result = PurePath(MASKS, source.result)
    if source.is_video:
        result = result.with_suffix("") / f"{index:06d}.png"
    elif result.suffix != ".png":
        result = PurePath(f"{result}.png")
    return replace(source, result=result, length=1, fps=None)


class Segmenter:
    """A segmentation model with trained weights.

    Args:
        config: Its config.
        checkpoint: Content of a checkpoint of it.
        path: Where the checkpoint comes from, for messages.
        device: Where it runs.

    Attributes:
        classes: Their names.
        palette: Red, green and blue of each class, 0 to 255.

    Raises:
        CheckpointError: The checkpoint is of another model.
        UserError: The config does not fit to itself.
    """

    def __init__(self, config: "Config", checkpoint: dict[str, Any], path: str, device: "torch.device") -> None:
        from mmengine.registry import init_default_scope

        from mambavision.openmmlab.config import explained
        from mambavision.openmmlab.prediction.sources import Preparation
        from mambavision.openmmlab.weights import trained_model

        init_default_scope(config.default_scope)
        with explained(config.filename):
            self.prepare = Preparation(config)
            self.classes, self.palette = _classes(config, checkpoint, path)
        self._model = trained_model(config, checkpoint, path, device)

    def segment(self, frame: "Frame") -> "np.ndarray":
        """Return the class of each pixel, (H, W) uint8."""
        import torch

        prepared = self.prepare(frame)
        with torch.inference_mode():
            sample = self._model.test_step({key: [value] for key, value in prepared.items()})[0]
        return sample.pred_sem_seg.data[0].to(torch.uint8).cpu().numpy()


def _classes(config: "Config", checkpoint: dict[str, Any], path: str) -> tuple[list[str], list[list[int]]]:
    """Return names and colours: those the checkpoint was trained with or, where it keeps none, the config's."""
    from check_data import build_dataset
    from mambavision.openmmlab.data.masks import number_of_classes

    from mambavision.errors import CheckpointError

    kept = checkpoint.get("meta", {}).get("dataset_meta") or {}
    if not kept.get("classes"):
        kept = build_dataset(config.test_dataloader.dataset, config, lazy_init=True).metainfo
    names, known = list(kept["classes"]), number_of_classes(config)[0]
    if len(names) != known:
        raise CheckpointError(
            f"{path}: names {len(names)} classes, and the model of {config.filename} has {known} (num_classes); give "
            "the config that the checkpoint was trained with."
        )
    palette = kept.get("palette") or []
    if len(palette) != len(names):
        raise CheckpointError(f"{path}: names {len(names)} classes and {len(palette)} colours (dataset_meta.palette).")
    return names, [list(colour) for colour in palette]


if __name__ == "__main__":
    main()
