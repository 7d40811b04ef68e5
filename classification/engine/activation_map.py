"""Drawing the dependence between positions of an image in the scan or attention of a block."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engine.figures import as_picture, fit_image_size, load_image, save_arrays, save_figure
from engine.model import open_classifier
from engine.options import ActivationMapOptions
from engine.predict import find_images
from mambavision.analysis import (
    AttentionRecord,
    Layout,
    MapKind,
    Mode,
    ScanRecord,
    attention_maps,
    block_name,
    cell_of_point,
    map_of_point,
    positions_read,
    record_blocks,
    rollout,
)
from mambavision.errors import UserError
from mambavision.files import check_writable, replacing
from mambavision.running.logs import start_logging
from mambavision.running.process import pick_device, this_process
from mambavision.running.progress import progress
from mambavision.running.ranges import check_ranges
from mambavision.text import as_json, escaped
from mambavision.timm_model import TimmModel

_logger = logging.getLogger(__name__)

_DEFAULT_MODES: tuple[Mode, ...] = ("CB", "CwBw", "ww")
_MODE_TITLES = {
    "CB": "CB\n$C_i B_j$",
    "CBdt": "CBdt\n$C_i B_j \\delta_j$",
    "CwBw": "CwBw\n$C_i B_j w_i/w_j$",
    "CwBdtw": "CwBdtw\n$C_i B_j \\delta_j w_i/w_j$",
    "ww": "ww\n$w_i/w_j$",
    "softmax": "softmax",
}


@dataclass(frozen=True)
class _Maps:
    """The maps of one block for one image."""

    layout: Layout
    by_name: dict[str, Tensor]  # (1, windows, length, length)
    scan: ScanRecord | None  # one of the scans that the maps show; None for attention
    is_rollout: bool


def draw_activation_maps(options: ActivationMapOptions) -> None:
    """Write a picture and its numbers for each image and point, and activation_maps.json, to --out."""
    check_ranges(options.flat())
    start_logging()
    device = pick_device(options.preprocessing.device, this_process())
    kinds = [MapKind.parse(name) for name in options.maps or ()]
    if options.rollout and any(kind.normalisation == "none" for kind in kinds):
        raise UserError("--rollout needs maps without negative values: add _norm or _absnorm to the names in --maps.")
    out = Path(options.out)
    check_writable(out / "activation_maps.json")
    files = find_images(options.inputs, out, results="*_x*_y*.png")
    classifier = open_classifier(options.preprocessing, options.model, options.checkpoint, device, exif_default=True)
    fit_image_size(classifier)
    first = 0 if options.rollout else options.block
    names = [block_name(classifier.model, options.stage, block) for block in range(first, options.block + 1)]
    rows = []
    with progress("activation maps", len(files), interval=10) as line:
        for number, file in enumerate(files):
            image = load_image(file, classifier, device)
            maps = _maps(classifier.model, image, names, kinds, options.rollout)
            for point in options.points:
                stem = f"{number:03d}_{file.stem}_x{point[0]:g}_y{point[1]:g}"
                shown = escaped(file.name).replace("$", r"\$")  # a dollar sign would start mathematics
                title = f"Contributions of the other cells of {shown} to the marked one\n{classifier.name}, {names[-1]}"
                title += f"\nrollout from {names[0]}" if options.rollout else ""
                rows.append(_draw(out / stem, title, as_picture(image, classifier), maps, point))
                rows[-1] |= {"image": str(file), "model": classifier.name, "blocks": names}
            line.step()
    with replacing(out / "activation_maps.json") as description:
        description.write(as_json(rows).encode())
    _logger.info("wrote %d pictures to %s, described in activation_maps.json", len(rows), out)


def _maps(model: TimmModel, image: Tensor, names: list[str], kinds: list[MapKind], is_rollout: bool) -> _Maps:
    records = record_blocks(model, image, names)
    layout = records[-1].layout
    scan = next((record for record in records if isinstance(record, ScanRecord)), None)
    if kinds and scan is None:
        raise UserError(f"{names[-1]}: has softmax attention, which has a single map: leave out --maps.")
    maps = [attention_maps(record, kinds or _default_kinds(record)) for record in records]
    if not is_rollout:
        return _Maps(layout, maps[0], scan, False)
    # In a stage of both, the one map of softmax attention goes with each map of the scans.
    wanted = dict.fromkeys(name for each in maps for name in each if name != "softmax") or ["softmax"]
    combined = {name: rollout([each[name if name in each else "softmax"] for each in maps]) for name in wanted}
    return _Maps(layout, combined, scan, True)


def _default_kinds(record: ScanRecord | AttentionRecord) -> list[MapKind]:
    if isinstance(record, AttentionRecord):
        return []
    count = len(record.routes)
    routes = [*range(count), *(("all", "nall") if count > 1 else ())]
    return [MapKind(mode, route) for mode in _DEFAULT_MODES for route in routes]


def _draw(path: Path, title: str, picture: np.ndarray, maps: _Maps, point: tuple[float, float]) -> dict[str, Any]:
    """Write a picture and its numbers; return what is on it."""
    taken = {name: map_of_point(each, maps.layout, point)[0].cpu().numpy() for name, each in maps.by_name.items()}
    kinds = {name: None if name == "softmax" else MapKind.parse(name) for name in taken}
    shown = {name: _without_unread(each, kinds[name], maps, point) for name, each in taken.items()}
    cell = cell_of_point(maps.layout, point)
    save_figure(_figure(title, picture, maps, shown, kinds, cell), path.with_name(path.name + ".png"))
    save_arrays(taken, path.with_name(path.name + ".npz"))
    return {"picture": path.name + ".png", "maps": path.name + ".npz", "point": point, "cell": cell}


def _without_unread(values: np.ndarray, kind: MapKind | None, maps: _Maps, point: tuple[float, float]) -> np.ndarray:
    """Return a map of a single route with NaN at the positions that it reads later."""
    if kind is None or maps.scan is None or maps.is_rollout:
        return values
    if kind.in_order_of_route or not isinstance(kind.route, int):
        return values
    is_read = map_of_point(positions_read(maps.scan, kind.route), maps.layout, point)[0].cpu().numpy()
    return np.where(is_read == 1, values, np.nan)


def _figure(
    title: str,
    picture: np.ndarray,
    maps: _Maps,
    shown: dict[str, np.ndarray],
    kinds: dict[str, MapKind | None],
    cell: tuple[int, int],
):
    from matplotlib.figure import Figure  # slow to import

    modes = list(dict.fromkeys(kind.mode if kind else "softmax" for kind in kinds.values()))
    rows = [[name for name, kind in kinds.items() if (kind.mode if kind else "softmax") == mode] for mode in modes]
    most = max(map(len, rows))
    # A row for each mode; of a single route, all in one row.
    shape, width = ((len(modes), most), 2 * most) if most > 1 else ((1, len(modes)), 3.2 * len(modes))
    figure = Figure(figsize=(3.6 + width, max(3.8, 1 + 2.3 * shape[0])), layout="constrained")
    is_partial = any(np.isnan(each).any() for each in shown.values())
    figure.suptitle(title + ("; grey: out of its reach" if is_partial else ""))
    parts: Any = figure.subfigures(1, 2, width_ratios=(3, width + 0.6))
    left, right = parts
    axes = left.subplots()
    axes.imshow(picture)
    rows_of_cells, columns_of_cells = maps.layout.height, maps.layout.width
    _mark(axes, cell, picture.shape[0] / rows_of_cells, picture.shape[1] / columns_of_cells)
    position = f"row {cell[0]}, column {cell[1]}\nof {rows_of_cells}x{columns_of_cells}"
    axes.set_title(f"image; cell in {position}", fontsize=10)
    axes.set_xlabel("x (pixels)")
    axes.set_ylabel("y (pixels)")
    grid = right.subplots(*shape, squeeze=False)
    for mode, names, row in zip(modes, rows, grid if most > 1 else grid.T, strict=True):
        least, largest = _range([shown[name] for name in names])
        for axes in row[len(names) :]:
            axes.axis("off")
        for axes, name in zip(row, names, strict=False):
            heat = axes.imshow(shown[name], cmap="viridis", vmin=least, vmax=largest)
            axes.set_facecolor("lightgrey")  # where there is no value
            _mark(axes, cell)
            axes.set_title(f"{name}\n{_meaning(kinds[name], maps.scan)}", fontsize=9)
            axes.tick_params(labelsize=7)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.get_major_locator().set_params(integer=True)
        row[0].set_ylabel(f"{_MODE_TITLES[mode]}\n\ny (cells)")
        right.colorbar(heat, ax=list(row), label="weight", aspect=15)
    for axes in grid[-1]:
        axes.set_xlabel("x (cells)")
    return figure


def _range(maps: list[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([each[np.isfinite(each)] for each in maps])
    return values.min(), values.max()


def _mark(axes: Any, cell: tuple[int, int], height: float = 1, width: float = 1) -> None:
    """Frame a cell of this height and width in the units of the axes, which begin at -0.5."""
    from matplotlib.patches import Rectangle

    corner = cell[1] * width - 0.5, cell[0] * height - 0.5
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="red", linewidth=1.5))


def _meaning(kind: MapKind | None, scan: ScanRecord | None) -> str:
    """Say in words which route a map is of."""
    if kind is None or scan is None:
        return "mean over the heads"
    if not isinstance(kind.route, int):
        return {"all": "sum over the routes", "nall": "mean over the routes"}[kind.route]
    if kind.in_order_of_route:
        return f"route {kind.route}, as it reads"
    route = scan.routes[kind.route]
    return ("by columns" if route.by_columns else "by rows") + (", backwards" if route.backwards else "")
