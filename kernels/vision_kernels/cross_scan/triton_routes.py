"""Launches of the Triton kernels for cross scan and cross merge."""

import torch
from torch import Tensor

from vision_kernels.cross_scan.routes import ROUTES
from vision_kernels.cross_scan.triton_kernels import merge_routes, scan_routes

_LARGEST_SIDE = 32
_ELEMENTS, _WARPS = 2048, 4  # of a tile


def _options(height: int, width: int, routes: str) -> dict[str, int]:
    """Return the constants of the kernels; a tile holds several small images."""
    rows, columns = (min(_LARGEST_SIDE, 1 << (side - 1).bit_length()) for side in (height, width))
    return {
        "COLUMNS": sum(route.by_columns << j for j, route in enumerate(ROUTES[routes])),
        "BACKWARDS": sum(route.backwards << j for j, route in enumerate(ROUTES[routes])),
        "PLANES": _ELEMENTS // (rows * columns),
        "TILE_ROWS": rows,
        "TILE_COLUMNS": columns,
        "num_warps": _WARPS,
    }


def _launch(kernel, source: Tensor, target: Tensor, image: tuple[int, int, int, int], routes: str) -> None:
    batch, dim, height, width = image
    options = _options(height, width, routes)
    row_blocks, column_blocks = -(-height // options["TILE_ROWS"]), -(-width // options["TILE_COLUMNS"])
    programs = -(-batch * dim // options["PLANES"]) * row_blocks * column_blocks
    sizes = (batch * dim, dim, height, width, row_blocks, column_blocks)
    with torch.cuda.device_of(source):
        kernel[(programs,)](source, target, *sizes, *source.stride(), **options)


def scan(x: Tensor, routes: str) -> Tensor:
    """Return (batch, 4, dim, length)."""
    batch, dim, height, width = x.shape
    y = x.new_empty(batch, 4, dim, height * width)
    _launch(scan_routes, x, y, (batch, dim, height, width), routes)
    return y


def merge(y: Tensor, height: int, width: int, routes: str) -> Tensor:
    """Return (batch, dim, length)."""
    batch, _, dim, length = y.shape
    x = y.new_empty(batch, dim, length)
    _launch(merge_routes, y, x, (batch, dim, height, width), routes)
    return x
