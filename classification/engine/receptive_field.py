"""Drawing effective receptive fields of models side by side, before and after training."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.figures import fit_image_size, load_image, save_arrays, save_figure
from engine.model import Classifier, open_classifier
from engine.options import ReceptiveFieldOptions
from engine.predict import evenly_spread, find_images
from mambavision.analysis import ReceptiveField, check_stage, display_scale, receptive_field, smallest_square
from mambavision.errors import UserError
from mambavision.files import check_writable, replacing
from mambavision.running.logs import start_logging
from mambavision.running.process import pick_device, this_process
from mambavision.running.progress import ProgressLine, progress
from mambavision.running.ranges import check_ranges
from mambavision.text import as_json

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Square:
    """The smallest square that contains more than a share of the field."""

    share: float
    side: int | None  # pixels; None if no square within the image contains so much
    area: float | None  # relative to the image


@dataclass
class _Panel:
    """One model with one kind of weights."""

    label: str
    weights: str
    checkpoint: str
    classifier: Classifier


def draw_receptive_fields(options: ReceptiveFieldOptions) -> None:
    """Write receptive_field.png, .json and .npz to --out."""
    check_ranges(options.flat())
    start_logging()
    device = pick_device(options.preprocessing.device, this_process())
    out = Path(options.out)
    check_writable(out / "receptive_field.png")
    files = evenly_spread(find_images(options.inputs, out, results="receptive_field.png"), options.count)
    panels = _panels(options, device)
    fields, squares = [], []
    with progress("receptive field", len(panels) * len(files), interval=10) as line:
        for panel in panels:
            images = (load_image(file, panel.classifier, device) for file in files)
            field = receptive_field(panel.classifier.model, _counted(images, line), options.stage)
            if field.skipped:
                _logger.warning(
                    "%s, %s: %d maps were not finite and were skipped", panel.label, panel.weights, field.skipped
                )
            fields.append(field)
            found = ((share, smallest_square(field.map, share)) for share in options.shares)
            squares.append([_Square(share, *(square or (None, None))) for share, square in found])
    maps = {
        f"{panel.label} {panel.weights}": field.map.cpu().numpy() for panel, field in zip(panels, fields, strict=True)
    }
    rows = [_row(*each, options.stage) for each in zip(panels, fields, squares, strict=True)]
    save_arrays(maps, out / "receptive_field.npz")
    with replacing(out / "receptive_field.json") as file:
        file.write(as_json(rows).encode())
    save_figure(_figure(panels, fields, squares), out / "receptive_field.png")
    _print(rows)
    _logger.info("wrote %s", ", ".join(str(out / f"receptive_field.{kind}") for kind in ("png", "json", "npz")))


def _panels(options: ReceptiveFieldOptions, device: torch.device) -> list[_Panel]:
    """Return the panels column by column; all models are opened before the first one runs."""
    models, checkpoints, preprocessing = options.model, options.checkpoint, options.preprocessing
    if models and checkpoints and len(models) != len(checkpoints):
        raise UserError(
            f"{len(models)} models and {len(checkpoints)} checkpoints: give one for each model ('' for "
            "released weights), or leave out --model for checkpoints of train.py."
        )
    names: Sequence[str | None] = models or [None] * len(checkpoints)
    columns = list(zip(names, checkpoints or [""] * len(models), strict=True))
    panels: list[_Panel] = []
    for number, (name, checkpoint) in enumerate(columns or [(None, "")]):
        for weights in dict.fromkeys(options.weights):
            torch.manual_seed(options.seed)
            classifier = open_classifier(
                preprocessing, name, checkpoint, device, exif_default=True, untrained=weights == "initial"
            )
            if panels and not (preprocessing.img_size or preprocessing.input_size):  # to be comparable
                size = panels[0].classifier.data_config["input_size"][1:]
                classifier.data_config["input_size"] = (classifier.data_config["input_size"][0], *size)
            fit_image_size(classifier)
            check_stage(classifier.model, options.stage)
            is_known = any(panel.label == classifier.name and panel.weights == weights for panel in panels)
            label = f"{classifier.name} ({number + 1})" if is_known else classifier.name
            panels.append(_Panel(label, weights, checkpoint, classifier))
    return panels


def _counted(images, line: ProgressLine):
    for image in images:
        yield image
        line.step()


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
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Rectangle

    rows = len(dict.fromkeys(panel.weights for panel in panels))
    columns = len(panels) // rows
    figure = Figure(figsize=(1.2 + 4 * columns, 0.5 + 4.2 * rows), layout=ConstrainedLayoutEngine(hspace=0.06))
    grid = figure.subplots(rows, columns, squeeze=False)
    shown = [display_scale(field.map).cpu().numpy() for field in fields]
    least = min(float(values.min()) for values in shown)
    for index, (panel, values) in enumerate(zip(panels, shown, strict=True)):
        axes = grid[index % rows, index // rows]
        picture = axes.imshow(values, cmap="magma", vmin=least, vmax=1)
        height, width = values.shape
        measured = [(square.share, square.side) for square in squares[index] if square.side]
        for _, side in measured:
            corner = width // 2 - side / 2, height // 2 - side / 2
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="cyan"))
        axes.set_title(f"{panel.label}, {panel.weights} weights", fontsize=11)
        shares = ", ".join(f"{100 * share:g}" for share, _ in measured)
        sides = ", ".join(str(side) for _, side in measured)
        caption = f"\n{shares} % of the influence\nin squares of side {sides}" if measured else ""
        axes.set_xlabel(f"x (pixels){caption}")
        axes.set_ylabel("y (pixels)")
    figure.colorbar(picture, ax=grid, label="influence on the middle (fifth root, largest = 1)", shrink=0.9, aspect=30)
    images = fields[0].images
    figure.suptitle(f"Effective receptive field, mean of {images} image{'s' * (images > 1)}")
    return figure
