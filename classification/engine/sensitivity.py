"""receptive_field.py's work: effective receptive fields of models side by side, before and after training."""

import argparse
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine import report
from engine.classify import evenly_spread, find_images
from engine.figures import fit_image_size, load_image, save_arrays, save_figure
from engine.saved import Classifier, open_classifier
from mambavision.analysis import ReceptiveField, check_stage, display_scale, receptive_field, smallest_square
from mambavision.errors import UserError
from mambavision.files import check_writable, replacing
from mambavision.launch import pick_device, this_process
from mambavision.ranges import check_ranges
from mambavision.reporting import start_logging
from mambavision.text import as_json

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Square:
    """The smallest square that holds more than a share of the field."""

    share: float
    side: int | None  # pixels; None if no square within the image holds so much
    area: float | None  # over that of the image


@dataclass
class _Panel:
    """One model with one kind of weights."""

    label: str
    weights: str
    checkpoint: str
    classifier: Classifier


def draw_receptive_fields(args: argparse.Namespace) -> None:
    """Write receptive_field.png, .json and .npz to --out."""
    check_ranges(args)
    start_logging()
    device = pick_device(args.device, this_process())
    out = Path(args.out)
    check_writable(out / "receptive_field.png")
    files = evenly_spread(find_images(args.inputs, out, results="receptive_field.png"), args.count)
    panels = _panels(args, device)
    fields, squares = [], []
    with report.progress("receptive field", len(panels) * len(files), interval=10) as line:
        for panel in panels:
            images = (load_image(file, panel.classifier, device) for file in files)
            field = receptive_field(panel.classifier.model, _counted(images, line), args.stage)
            if field.skipped:
                _logger.warning(
                    "%s, %s: %d maps were not finite and were left out", panel.label, panel.weights, field.skipped
                )
            fields.append(field)
            found = ((share, smallest_square(field.map, share)) for share in args.shares)
            squares.append([_Square(share, *(square or (None, None))) for share, square in found])
    maps = {
        f"{panel.label} {panel.weights}": field.map.cpu().numpy() for panel, field in zip(panels, fields, strict=True)
    }
    rows = [_row(*each, args.stage) for each in zip(panels, fields, squares, strict=True)]
    save_arrays(maps, out / "receptive_field.npz")
    with replacing(out / "receptive_field.json") as file:
        file.write(as_json(rows).encode())
    save_figure(_figure(panels, fields, squares), out / "receptive_field.png")
    _print(rows)
    _logger.info("wrote %s", ", ".join(str(out / f"receptive_field.{kind}") for kind in ("png", "json", "npz")))


def _panels(args: argparse.Namespace, device: torch.device) -> list[_Panel]:
    """Return the panels, column after column; all models are opened before the first one runs."""
    if args.model and args.checkpoint and len(args.model) != len(args.checkpoint):
        raise UserError(
            f"{len(args.model)} models and {len(args.checkpoint)} checkpoints: give one for each model ('' for "
            "released weights), or leave out --model for checkpoints of train.py."
        )
    columns = list(
        zip(args.model or [None] * len(args.checkpoint), args.checkpoint or [""] * len(args.model), strict=True)
    )
    panels: list[_Panel] = []
    for number, (name, checkpoint) in enumerate(columns or [(None, "")]):
        for weights in dict.fromkeys(args.weights):
            torch.manual_seed(args.seed)
            classifier = open_classifier(
                args, name, checkpoint, device, exif_default=True, untrained=weights == "initial"
            )
            if panels and not (args.img_size or args.input_size):  # to be comparable
                size = panels[0].classifier.data_config["input_size"][1:]
                classifier.data_config["input_size"] = (classifier.data_config["input_size"][0], *size)
            fit_image_size(classifier)
            check_stage(classifier.model, args.stage)
            is_known = any(panel.label == classifier.name and panel.weights == weights for panel in panels)
            label = f"{classifier.name} ({number + 1})" if is_known else classifier.name
            panels.append(_Panel(label, weights, checkpoint, classifier))
    return panels


def _counted(images, line: report.ProgressLine):
    for image in images:
        yield image
        line.step(str)


def _row(panel: _Panel, field: ReceptiveField, squares: list[_Square], stage: int) -> dict[str, Any]:
    return {
        "model": panel.classifier.name,
        "map": f"{panel.label} {panel.weights}",
        "weights": panel.weights,
        "checkpoint": panel.checkpoint,
        "stage": stage,
        "input_size": panel.classifier.data_config["input_size"],
        "images": field.images,
        "skipped": field.skipped,
        "squares": [asdict(square) for square in squares],
    }


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['map']} (mean of {row['images']} images)")
        for square in row["squares"]:
            held = f"    more than {100 * square['share']:g} % within "
            if square["side"] is None:
                print(held + "no square inside the image")
            else:
                print(held + f"{square['side']}x{square['side']} pixels, {100 * square['area']:.1f} % of the image")


def _figure(panels: list[_Panel], fields: list[ReceptiveField], squares: list[list[_Square]]):
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.patches import Rectangle

    rows = len(dict.fromkeys(panel.weights for panel in panels))
    columns = len(panels) // rows
    figure = Figure(figsize=(1.2 + 4 * columns, 0.5 + 4.2 * rows), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    grid = figure.subplots(rows, columns, squeeze=False)
    shown = [display_scale(field.map).cpu().numpy() for field in fields]
    least = min(float(values.min()) for values in shown)
    for index, (panel, values) in enumerate(zip(panels, shown, strict=True)):
        axes = grid[index % rows, index // rows]
        picture = axes.imshow(values, cmap="magma", vmin=least, vmax=1)
        height, width = values.shape
        measured = [square for square in squares[index] if square.side]
        for square in measured:
            corner = width // 2 - square.side / 2, height // 2 - square.side / 2
            axes.add_patch(Rectangle(corner, square.side, square.side, fill=False, edgecolor="cyan"))
        axes.set_title(f"{panel.label}, {panel.weights} weights", fontsize=11)
        shares = ", ".join(f"{100 * square.share:g}" for square in measured)
        sides = ", ".join(str(square.side) for square in measured)
        caption = f"\n{shares} % of the influence\nin squares of side {sides}" if measured else ""
        axes.set_xlabel(f"x (pixels){caption}")
        axes.set_ylabel("y (pixels)")
    figure.colorbar(picture, ax=grid, label="influence on the middle (fifth root, largest = 1)", shrink=0.9, aspect=30)
    images = fields[0].images
    figure.suptitle(f"Effective receptive field, mean of {images} image{'s' * (images > 1)}")
    return figure
