"""Triton kernels for neighborhood attention without dilation; dilated attention runs on more and smaller maps.

A program takes a tile of queries and iterates, like block-wise attention, over the rows of keys that any of them sees,
with an online softmax. A row is restricted to the columns that the tile sees, so that the products are dense and most
of their results are used. Gradients of keys and values come from a second kernel, in which a program owns a tile of
keys and iterates over the rows of queries that see any of them, so no two programs add to the same element.

Positions are (row, column); a window starts at clamp(position - kernel_size // 2, 0, size - kernel_size). A map is a
view by strides b (batch), n (heads), h, w and d.
"""

import triton
import triton.language as tl

from vision_kernels.triton_math import LOG2_E


@triton.jit
def _place(row_tiles, column_tiles, heads):
    """Return the index of the pair (batch entry, head), both of its parts, and the row and column of the tile."""
    program = tl.program_id(0)
    pair = (program // column_tiles // row_tiles).to(tl.int64)
    return pair, pair // heads, pair % heads, program // column_tiles % row_tiles, program % column_tiles


@triton.jit
def _start(position, size, KERNEL: tl.constexpr):
    """Return the start of the window of a position."""
    return tl.minimum(tl.maximum(position - KERNEL // 2, 0), size - KERNEL)


@triton.jit
def _first_seer(position, KERNEL: tl.constexpr):
    """Return the first position whose window contains this one."""
    return tl.where(position < KERNEL, 0, position - KERNEL // 2)


@triton.jit
def _last_seer(position, size, KERNEL: tl.constexpr):
    """Return the last position whose window contains this one."""
    return tl.where(position >= size - KERNEL, size - 1, position + KERNEL // 2)


@triton.jit
def _tile(row_tile, column_tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows and columns of a tile's positions, which of them exist, and the tile's last row and column."""
    position = tl.arange(0, ROWS * COLUMNS)
    row, column = row_tile * ROWS + position // COLUMNS, column_tile * COLUMNS + position % COLUMNS
    last_row = tl.minimum(row_tile * ROWS + ROWS, height) - 1
    last_column = tl.minimum(column_tile * COLUMNS + COLUMNS, width) - 1
    return row, column, (row < height) & (column < width), last_row, last_column


@triton.jit
def _load(at, row, column, inside, h, w, d, DIM: tl.constexpr, DIMS: tl.constexpr):
    """Load (positions, DIMS), with zeros beyond DIM and for missing positions."""
    k = tl.arange(0, DIMS)
    offset = row.to(tl.int64) * h + column.to(tl.int64) * w
    return tl.load(at + offset[:, None] + k[None, :] * d, mask=inside[:, None] & (k < DIM)[None, :], other=0.0)


@triton.jit
def _logits(
    queries, keys, bias, head, q_row, q_column, k_row, k_column, exists, height, width,
    KERNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the base-2 logits (queries, keys), minus infinity where a query does not see a key."""
    row_start, column_start = _start(q_row, height, KERNEL)[:, None], _start(q_column, width, KERNEL)[:, None]
    row, column = k_row[None, :], k_column[None, :]
    seen = (row >= row_start) & (row < row_start + KERNEL) & (column >= column_start) & (column < column_start + KERNEL)
    seen &= exists
    logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if bias is not None:
        SIDE: tl.constexpr = 2 * KERNEL - 1
        at = (row - q_row[:, None] + KERNEL - 1) * SIDE + column - q_column[:, None] + KERNEL - 1
        logits += tl.load(bias + head * SIDE * SIDE + at, mask=seen, other=0.0)
    return tl.where(seen, logits * LOG2_E, float("-inf"))


@triton.jit
def attention_forward(
    query, key, value, bias, out, heads, height, width, row_tiles, column_tiles,
    q_b, q_n, q_h, q_w, q_d, k_b, k_n, k_h, k_w, k_d, v_b, v_n, v_h, v_w, v_d,
    KERNEL: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out (batch, heads, height, width, DIM), contiguous."""
    pair, entry, head, row_tile, column_tile = _place(row_tiles, column_tiles, heads)
    q_row, q_column, inside, last_row, last_column = _tile(row_tile, column_tile, height, width, ROWS, COLUMNS)
    queries = _load(query + entry * q_b + head * q_n, q_row, q_column, inside, q_h, q_w, q_d, DIM, DIMS)
    first_row, first_column = _start(row_tile * ROWS, height, KERNEL), _start(column_tile * COLUMNS, width, KERNEL)
    across = _start(last_column, width, KERNEL) + KERNEL - first_column
    count = (_start(last_row, height, KERNEL) + KERNEL - first_row) * across
    largest = tl.full((ROWS * COLUMNS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS * COLUMNS,), tl.float32)
    result = tl.zeros((ROWS * COLUMNS, DIMS), tl.float32)
    for first in range(0, count, KEYS):
        at = first + tl.arange(0, KEYS)
        known = at < count
        row, column = first_row + at // across, first_column + at % across
        keys = _load(key + entry * k_b + head * k_n, row, column, known, k_h, k_w, k_d, DIM, DIMS)
        values = _load(value + entry * v_b + head * v_n, row, column, known, v_h, v_w, v_d, DIM, DIMS)
        logits = _logits(
            queries, keys, bias, head, q_row, q_column, row, column, known[None, :], height, width, KERNEL, PRECISION
        )
        larger = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # nothing has been seen yet
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(largest - finite)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        largest = larger
    k = tl.arange(0, DIMS)
    offset = ((pair * height + q_row) * width + q_column)[:, None] * DIM + k[None, :]
    result = result / total[:, None]
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=inside[:, None] & (k < DIM)[None, :])


@triton.jit
def attention_backward_query(
    grad_out, query, key, value, bias, grad_query, normalizer, overlap, heads, height, width, row_tiles, column_tiles,
    g_b, g_n, g_h, g_w, g_d, q_b, q_n, q_h, q_w, q_d, k_b, k_n, k_h, k_w, k_d, v_b, v_n, v_h, v_w, v_d,
    KERNEL: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write grad_query, contiguous, and the statistics (batch, heads, height, width) that the other kernels need.

    These are the base-2 logarithm of the normalizer of the softmax, and the product of the output with its gradient.
    """
    pair, entry, head, row_tile, column_tile = _place(row_tiles, column_tiles, heads)
    q_row, q_column, inside, last_row, last_column = _tile(row_tile, column_tile, height, width, ROWS, COLUMNS)
    queries = _load(query + entry * q_b + head * q_n, q_row, q_column, inside, q_h, q_w, q_d, DIM, DIMS)
    grads = _load(grad_out + entry * g_b + head * g_n, q_row, q_column, inside, g_h, g_w, g_d, DIM, DIMS)
    first_row, first_column = _start(row_tile * ROWS, height, KERNEL), _start(column_tile * COLUMNS, width, KERNEL)
    across = _start(last_column, width, KERNEL) + KERNEL - first_column
    count = (_start(last_row, height, KERNEL) + KERNEL - first_row) * across
    largest = tl.full((ROWS * COLUMNS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS * COLUMNS,), tl.float32)
    product = tl.zeros((ROWS * COLUMNS,), tl.float32)
    for first in range(0, count, KEYS):
        at = first + tl.arange(0, KEYS)
        known = at < count
        row, column = first_row + at // across, first_column + at % across
        keys = _load(key + entry * k_b + head * k_n, row, column, known, k_h, k_w, k_d, DIM, DIMS)
        values = _load(value + entry * v_b + head * v_n, row, column, known, v_h, v_w, v_d, DIM, DIMS)
        logits = _logits(
            queries, keys, bias, head, q_row, q_column, row, column, known[None, :], height, width, KERNEL, PRECISION
        )
        larger = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(largest - finite)
        total = total * shrink + tl.sum(weights, 1)
        of_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        product = product * shrink + tl.sum(weights * of_weights, 1)
        largest = larger
    product = product / total
    largest += tl.log2(total)
    place = (pair * height + q_row) * width + q_column
    tl.store(normalizer + place, largest, mask=inside)
    tl.store(overlap + place, product, mask=inside)

    result = tl.zeros((ROWS * COLUMNS, DIMS), tl.float32)
    for first in range(0, count, KEYS):
        at = first + tl.arange(0, KEYS)
        known = at < count
        row, column = first_row + at // across, first_column + at % across
        keys = _load(key + entry * k_b + head * k_n, row, column, known, k_h, k_w, k_d, DIM, DIMS)
        values = _load(value + entry * v_b + head * v_n, row, column, known, v_h, v_w, v_d, DIM, DIMS)
        logits = _logits(
            queries, keys, bias, head, q_row, q_column, row, column, known[None, :], height, width, KERNEL, PRECISION
        )
        of_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        of_logits = tl.exp2(logits - largest[:, None]) * (of_weights - product[:, None])
        result += tl.dot(of_logits.to(keys.dtype), keys, input_precision=PRECISION)
    k = tl.arange(0, DIMS)
    mask = inside[:, None] & (k < DIM)[None, :]
    tl.store(grad_query + place[:, None] * DIM + k[None, :], result.to(grad_query.dtype.element_ty), mask=mask)


@triton.jit
def attention_backward_key_value(
    grad_out, query, key, value, bias, normalizer, overlap, grad_key, grad_value,
    heads, height, width, row_tiles, column_tiles,
    g_b, g_n, g_h, g_w, g_d, q_b, q_n, q_h, q_w, q_d, k_b, k_n, k_h, k_w, k_d, v_b, v_n, v_h, v_w, v_d,
    KERNEL: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write grad_key and grad_value, contiguous; a tile is of keys, and KEYS is the number of queries at a time."""
    pair, entry, head, row_tile, column_tile = _place(row_tiles, column_tiles, heads)
    k_row, k_column, inside, last_row, last_column = _tile(row_tile, column_tile, height, width, ROWS, COLUMNS)
    keys = _load(key + entry * k_b + head * k_n, k_row, k_column, inside, k_h, k_w, k_d, DIM, DIMS)
    values = _load(value + entry * v_b + head * v_n, k_row, k_column, inside, v_h, v_w, v_d, DIM, DIMS)
    first_row, first_column = _first_seer(row_tile * ROWS, KERNEL), _first_seer(column_tile * COLUMNS, KERNEL)
    across = _last_seer(last_column, width, KERNEL) + 1 - first_column
    count = (_last_seer(last_row, height, KERNEL) + 1 - first_row) * across
    of_keys = tl.zeros((ROWS * COLUMNS, DIMS), tl.float32)
    of_values = tl.zeros((ROWS * COLUMNS, DIMS), tl.float32)
    for first in range(0, count, KEYS):
        at = first + tl.arange(0, KEYS)
        known = at < count
        row, column = first_row + at // across, first_column + at % across
        queries = _load(query + entry * q_b + head * q_n, row, column, known, q_h, q_w, q_d, DIM, DIMS)
        grads = _load(grad_out + entry * g_b + head * g_n, row, column, known, g_h, g_w, g_d, DIM, DIMS)
        place = (pair * height + row) * width + column
        normalizers = tl.load(normalizer + place, mask=known, other=0.0)
        products = tl.load(overlap + place, mask=known, other=0.0)
        logits = _logits(
            queries, keys, bias, head, row, column, k_row, k_column, known[:, None], height, width, KERNEL, PRECISION
        )
        weights = tl.exp2(logits - normalizers[:, None])
        of_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        of_logits = weights * (of_weights - products[:, None])
        of_values += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
        of_keys += tl.dot(tl.trans(of_logits.to(queries.dtype)), queries, input_precision=PRECISION)
    k = tl.arange(0, DIMS)
    mask = inside[:, None] & (k < DIM)[None, :]
    offset = ((pair * height + k_row) * width + k_column)[:, None] * DIM + k[None, :]
    tl.store(grad_key + offset, of_keys.to(grad_key.dtype.element_ty), mask=mask)
    tl.store(grad_value + offset, of_values.to(grad_value.dtype.element_ty), mask=mask)


@triton.jit
def attention_backward_bias(
    grad_out, query, key, value, bias, normalizer, overlap, grad_bias, heads, height, width, row_tiles, column_tiles,
    g_b, g_n, g_h, g_w, g_d, q_b, q_n, q_h, q_w, q_d, k_b, k_n, k_h, k_w, k_d, v_b, v_n, v_h, v_w, v_d,
    KERNEL: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write to grad_bias, (batch, heads, tiles, SIDE, SIDE) of zeros, the gradient from each tile of queries."""
    pair, entry, head, row_tile, column_tile = _place(row_tiles, column_tiles, heads)
    q_row, q_column, inside, last_row, last_column = _tile(row_tile, column_tile, height, width, ROWS, COLUMNS)
    queries = _load(query + entry * q_b + head * q_n, q_row, q_column, inside, q_h, q_w, q_d, DIM, DIMS).to(tl.float32)
    grads = _load(grad_out + entry * g_b + head * g_n, q_row, q_column, inside, g_h, g_w, g_d, DIM, DIMS).to(tl.float32)
    place = (pair * height + q_row) * width + q_column
    normalizers = tl.load(normalizer + place, mask=inside, other=0.0)
    products = tl.load(overlap + place, mask=inside, other=0.0)
    row_start, column_start = _start(q_row, height, KERNEL), _start(q_column, width, KERNEL)
    SIDE: tl.constexpr = 2 * KERNEL - 1
    # Over a tile the distance to the start of the window never increases.
    top, left = row_tile * ROWS, column_tile * COLUMNS
    rows_from, rows_to = _start(last_row, height, KERNEL) - last_row, _start(top, height, KERNEL) - top + KERNEL
    columns_from = _start(last_column, width, KERNEL) - last_column
    columns_to = _start(left, width, KERNEL) - left + KERNEL
    across = columns_to - columns_from
    target = grad_bias + tl.program_id(0).to(tl.int64) * SIDE * SIDE
    for at in range(0, (rows_to - rows_from) * across):
        down, right = rows_from + at // across, columns_from + at % across
        row, column = q_row + down, q_column + right
        seen = inside & (row >= row_start) & (row < row_start + KERNEL)
        seen = seen & (column >= column_start) & (column < column_start + KERNEL)
        keys = _load(key + entry * k_b + head * k_n, row, column, seen, k_h, k_w, k_d, DIM, DIMS).to(tl.float32)
        values = _load(value + entry * v_b + head * v_n, row, column, seen, v_h, v_w, v_d, DIM, DIMS).to(tl.float32)
        index = (down + KERNEL - 1) * SIDE + right + KERNEL - 1
        logits = tl.sum(queries * keys, 1) + tl.load(bias + head * SIDE * SIDE + index)
        of_logits = tl.exp2(logits * LOG2_E - normalizers) * (tl.sum(grads * values, 1) - products)
        tl.store(target + index, tl.sum(tl.where(seen, of_logits, 0.0), 0))
