"""Triton kernels that read images along routes, and merge the routes.

They are limited by memory bandwidth: a program moves a tile (planes, rows, columns) of images, which is read once and
written along all four routes, or the reverse. Bit j of COLUMNS and BACKWARDS says whether route j goes by columns, and
whether backwards.
"""

import triton
import triton.language as tl


@triton.jit
def _place(height, width, row_blocks, column_blocks, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return planes, rows and columns of a tile, as (PLANES, 1, 1), (1, ROWS, 1) and (1, 1, COLUMNS)."""
    program = tl.program_id(0)
    column = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = program // column_blocks % row_blocks * ROWS + tl.arange(0, ROWS)
    first = (program // column_blocks // row_blocks).to(tl.int64) * PLANES
    return (first + tl.arange(0, PLANES))[:, None, None], row[None, :, None], column[None, None, :]


@triton.jit
def _position(row, column, height, width, BY_COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr):
    """Return the step at which a route visits a row and column."""
    step = column * height + row if BY_COLUMNS else row * width + column
    return height * width - 1 - step if BACKWARDS else step


@triton.jit
def scan_routes(
    x, y, planes, dim, height, width, row_blocks, column_blocks, x_b, x_d, x_h, x_w,
    COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr,
    PLANES: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write y (batch, 4, dim, length), contiguous."""
    plane, row, column = _place(height, width, row_blocks, column_blocks, PLANES, TILE_ROWS, TILE_COLUMNS)
    inside = (plane < planes) & (row < height) & (column < width)
    entry, channel = plane // dim, plane % dim
    image = tl.load(
        x + entry * x_b + channel * x_d + row.to(tl.int64) * x_h + column.to(tl.int64) * x_w, mask=inside, other=0.0
    )
    for j in tl.static_range(4):
        step = _position(row, column, height, width, (COLUMNS >> j) & 1, (BACKWARDS >> j) & 1)
        tl.store(y + ((entry * 4 + j) * dim + channel) * (height * width) + step, image, mask=inside)


@triton.jit
def merge_routes(
    y, x, planes, dim, height, width, row_blocks, column_blocks, y_b, y_j, y_d, y_l,
    COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr,
    PLANES: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write x (batch, dim, length), contiguous: the sums over routes in float32, rounded once."""
    plane, row, column = _place(height, width, row_blocks, column_blocks, PLANES, TILE_ROWS, TILE_COLUMNS)
    inside = (plane < planes) & (row < height) & (column < width)
    at = y + plane // dim * y_b + plane % dim * y_d
    total = tl.zeros((PLANES, TILE_ROWS, TILE_COLUMNS), tl.float32)
    for j in tl.static_range(4):
        step = _position(row, column, height, width, (COLUMNS >> j) & 1, (BACKWARDS >> j) & 1)
        total += tl.load(at + tl.full((), j, tl.int64) * y_j + step.to(tl.int64) * y_l, mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(x + plane * (height * width) + row * width + column, total.to(x.dtype.element_ty), mask=inside)
