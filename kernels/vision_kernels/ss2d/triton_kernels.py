"""Triton kernels for SS2D: a selective scan along one route of an image, which is read and written in place.

As in the kernels of `selective_scan`, a program scans one block of channels step by step, with one channel per lane and
its states in registers, and time is split into chunks if there are too few programs. A route is a walk along lines, the
rows or columns of the image, given by three offsets: of its first position, to the next line and along a line; these
are negative for a reversed route. Blocks of steps end with a line, so that the position of a step needs no division.
The step sizes are computed from their low-rank factors in the same loop. Outputs of the four routes are summed launch
by launch, in float32, so that each sum has a fixed order.

`unit` is 1, the stride of tiles, which Triton must not know; see the kernels of `selective_scan`.
"""

import triton
import triton.language as tl

from vision_kernels.triton_math import LOG2_E, finite, load_steps, sigmoid, softplus

_SIZES = ("height", "width", "blocks", "chunks")  # not specialized, as in the kernels of selective_scan


@triton.jit
def _walk(route, height, width, stride_h, stride_w, COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr):
    """Return the offsets of the route's first position, to the next line, and along a line, for these strides."""
    zero = tl.full((), 0, tl.int64)
    down, right = zero + stride_h, zero + stride_w
    by_columns = ((COLUMNS >> route) & 1) == 1
    across, along = tl.where(by_columns, right, down), tl.where(by_columns, down, right)
    backwards = ((BACKWARDS >> route) & 1) == 1
    first = tl.where(backwards, (height - 1) * down + (width - 1) * right, zero)
    return first, tl.where(backwards, -across, across), tl.where(backwards, -along, along)


@triton.jit
def _lines(route, height, width, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
    """Return the length of a line, and the numbers of blocks of steps in a line and in the route."""
    by_columns = ((COLUMNS >> route) & 1) == 1
    length, lines = tl.where(by_columns, height, width), tl.where(by_columns, width, height)
    in_line = (length + STEPS - 1) // STEPS
    return length, in_line, lines * in_line


@triton.jit
def _place(dim, blocks, chunks, BLOCK: tl.constexpr):
    """Return the batch entry, chunk and channels."""
    program = tl.program_id(0)
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks // chunks).to(tl.int64), program // blocks % chunks, channel.to(tl.int64)


@triton.jit
def _rows(table, channel, row, exists, unit, COUNT: tl.constexpr):
    """Return (channels, rows) of a table (dim, COUNT) in float32, with zeros for missing elements."""
    mask = exists[:, None] & (row < COUNT)[None, :]
    return tl.load(table + channel[:, None] * COUNT + row[None, :] * unit, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _low_weight(weight, channel, exists, RANK: tl.constexpr):
    """Return a tuple of the columns of a matrix (dim, RANK)."""
    columns = ()
    for r in tl.static_range(RANK):
        columns = columns + (tl.load(weight + channel * RANK + r, mask=exists, other=0.0),)
    return columns


@triton.jit
def _load_low(at, t, stop, stride, RANK: tl.constexpr, STEPS: tl.constexpr):
    """Load the low-rank step sizes of STEPS steps as a tuple, step by step.

    One number for all lanes at a time: a tile of them would be spread over lanes, and the sum with it.
    """
    steps = ()
    for k in tl.static_range(STEPS):
        for r in tl.static_range(RANK):
            steps = steps + (tl.load(at + (t + k) * stride + r, mask=t + k < stop, other=0.0),)
    return steps


@triton.jit
def _step_size(low, weight, shift, valid, K: tl.constexpr, RANK: tl.constexpr):
    """Return the step size, zero for missing steps, and the argument of the softplus."""
    raw = shift
    for r in tl.static_range(RANK):
        raw += low[K * RANK + r].to(tl.float32) * weight[r]
    return tl.where(valid, softplus(raw), 0.0), raw


@triton.jit(do_not_specialize=["first_route", "unit", *_SIZES])
def ss2d_forward(
    x, projections, weight, bias, A, D, before, y, totals, states,
    first_route, height, width, dim, blocks, chunks, x_b, x_d, x_h, x_w, p_b, p_l, p_j, unit, y_b, y_d, y_h, y_w,
    RANK: tl.constexpr, STATES: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr,
    OUTPUT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Write to y the output of a route plus `before` (if any); or the sum of steps and the end state of chunks.

    The latter without `OUTPUT`, for the four routes at once: totals is (batch, 4, chunks, dim), and states (batch, 4,
    chunks, TILE, dim); where `CHAINED`, the start of each chunk.
    """
    entry, chunk, channel = _place(dim, blocks, chunks, BLOCK)
    route = first_route + tl.program_id(1)
    exists = channel < dim
    state, alike = tl.arange(0, TILE), tl.zeros((BLOCK, 1), tl.int32)
    of_route = tl.full((), 0, tl.int64) + route * dim
    low_weight = _low_weight(weight + of_route * RANK, channel, exists, RANK)
    exponent = finite(_rows(A + of_route * STATES, channel, state, exists, unit, STATES) * LOG2_E)
    shift = tl.load(bias + of_route + channel, mask=exists, other=0.0)
    x_first, x_across, x_along = _walk(route, height, width, x_h, x_w, COLUMNS, BACKWARDS)
    p_first, p_across, p_along = _walk(route, height, width, width * p_l, p_l, COLUMNS, BACKWARDS)
    x_at = x + entry * x_b + channel * x_d + x_first
    low_at = projections + entry * p_b + route * p_j + p_first
    B_at = projections + entry * p_b + route * p_j + p_first + (RANK + state[None, :] * unit + alike)
    known = (state < STATES)[None, :] if STATES < TILE else alike == 0
    if OUTPUT:
        skip = tl.load(D + of_route + channel, mask=exists, other=0.0)
        y_first, y_across, y_along = _walk(route, height, width, y_h, y_w, COLUMNS, BACKWARDS)
        y_offset = entry * y_b + channel * y_d + y_first
    row = (entry * 4 + route) * chunks + chunk
    of_chunk = row * TILE * dim + (state[None, :] * dim + channel[:, None] * unit)

    length, in_line, all_blocks = _lines(route, height, width, COLUMNS, STEPS)
    in_chunk = (all_blocks + chunks - 1) // chunks
    last = tl.minimum((chunk + 1) * in_chunk, all_blocks)
    h = tl.zeros((BLOCK, TILE), tl.float32)
    if CHAINED:
        h = tl.load(states + of_chunk, mask=exists[:, None], other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    line, t = chunk * in_chunk // in_line, chunk * in_chunk % in_line * STEPS
    stop = tl.where(chunk * in_chunk < last, length, 0)
    x_next = load_steps(x_at + line * x_across, t, stop, x_along, exists, STEPS)
    low_next = _load_low(low_at + line * p_across, t, stop, p_along, RANK, STEPS)
    B_next = load_steps(B_at + line * p_across, t, stop, p_along, known, STEPS)
    if OUTPUT:
        C_next = load_steps(B_at + STATES + line * p_across, t, stop, p_along, known, STEPS)
    for block in range(chunk * in_chunk, last):
        x_now, low_now, B_now, line_now, t_now = x_next, low_next, B_next, line, t
        line, t = (block + 1) // in_line, (block + 1) % in_line * STEPS
        stop = tl.where(block + 1 < last, length, 0)
        x_next = load_steps(x_at + line * x_across, t, stop, x_along, exists, STEPS)
        low_next = _load_low(low_at + line * p_across, t, stop, p_along, RANK, STEPS)
        B_next = load_steps(B_at + line * p_across, t, stop, p_along, known, STEPS)
        if OUTPUT:
            C_now = C_next
            C_next = load_steps(B_at + STATES + line * p_across, t, stop, p_along, known, STEPS)
            offset = y_offset + line_now * y_across
            if before is not None:
                before_now = load_steps(before + offset, t_now, length, y_along, exists, STEPS)
        for k in tl.static_range(STEPS):
            step, raw = _step_size(low_now, low_weight, shift, t_now + k < length, k, RANK)
            value = x_now[k].to(tl.float32)
            h = tl.exp2(step[:, None] * exponent) * h + (step * value)[:, None] * B_now[k].to(tl.float32)
            if OUTPUT:
                out = tl.sum(h * C_now[k].to(tl.float32), 1) + skip * value
                if before is not None:
                    out += before_now[k]
                inside = exists & (t_now + k < length)
                tl.store(y + offset + (t_now + k) * y_along, out.to(y.dtype.element_ty), mask=inside)
            else:
                total += step
    if not OUTPUT:
        tl.store(states + of_chunk, h, mask=exists[:, None])
        tl.store(totals + row * dim + channel, total, mask=exists)


@triton.jit(do_not_specialize=["unit", *_SIZES])
def ss2d_adjoint(
    grad_y, projections, weight, bias, A, adjoints,
    height, width, dim, blocks, chunks, g_b, g_d, g_h, g_w, p_b, p_l, p_j, unit,
    RANK: tl.constexpr, STATES: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Write what each chunk contributes to the gradient of the states before it, with nothing from later chunks."""
    entry, chunk, channel = _place(dim, blocks, chunks, BLOCK)
    route = tl.program_id(1)
    exists = channel < dim
    state, alike = tl.arange(0, TILE), tl.zeros((BLOCK, 1), tl.int32)
    of_route = tl.full((), 0, tl.int64) + route * dim
    low_weight = _low_weight(weight + of_route * RANK, channel, exists, RANK)
    exponent = finite(_rows(A + of_route * STATES, channel, state, exists, unit, STATES) * LOG2_E)
    shift = tl.load(bias + of_route + channel, mask=exists, other=0.0)
    g_first, g_across, g_along = _walk(route, height, width, g_h, g_w, COLUMNS, BACKWARDS)
    p_first, p_across, p_along = _walk(route, height, width, width * p_l, p_l, COLUMNS, BACKWARDS)
    g_at = grad_y + entry * g_b + channel * g_d + g_first
    low_at = projections + entry * p_b + route * p_j + p_first
    C_at = projections + entry * p_b + route * p_j + p_first + (RANK + STATES + state[None, :] * unit + alike)
    known = (state < STATES)[None, :] if STATES < TILE else alike == 0

    length, in_line, all_blocks = _lines(route, height, width, COLUMNS, STEPS)
    in_chunk = (all_blocks + chunks - 1) // chunks
    last = tl.minimum((chunk + 1) * in_chunk, all_blocks)
    handed = tl.zeros((BLOCK, TILE), tl.float32)
    for back in range(chunk * in_chunk, last):
        block = chunk * in_chunk + last - 1 - back
        line, t = block // in_line, block % in_line * STEPS
        g_now = load_steps(g_at + line * g_across, t, length, g_along, exists, STEPS)
        low_now = _load_low(low_at + line * p_across, t, length, p_along, RANK, STEPS)
        C_now = load_steps(C_at + line * p_across, t, length, p_along, known, STEPS)
        for k in tl.static_range(STEPS - 1, -1, -1):
            step, raw = _step_size(low_now, low_weight, shift, t + k < length, k, RANK)
            grad = handed + g_now[k].to(tl.float32)[:, None] * C_now[k].to(tl.float32)
            handed = tl.exp2(step[:, None] * exponent) * grad
    of_chunk = ((entry * 4 + route) * chunks + chunk) * TILE * dim + (state[None, :] * dim + channel[:, None] * unit)
    tl.store(adjoints + of_chunk, handed, mask=exists[:, None])


@triton.jit(do_not_specialize=["route", "unit", *_SIZES])
def ss2d_backward(
    grad_y, x, projections, weight, bias, A, D, starts, adjoints, boundaries,
    before, grad_x, grad_raw, grad_couplings, grad_A, grad_D, grad_bias,
    route, height, width, dim, blocks, chunks,
    g_b, g_d, g_h, g_w, x_b, x_d, x_h, x_w, p_b, p_l, p_j, unit, gx_b, gx_d, gx_h, gx_w,
    RANK: tl.constexpr, STATES: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr, BACKWARDS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one route; to grad_x its gradient plus `before` (if any).

    First forwards, keeping the state before each block of steps in boundaries (batch, blocks of steps, TILE, dim); then
    backwards, computing the states inside of a block again. grad_raw (batch, length, dim) in row-major order is the
    gradient of what the softplus is taken of. Parts of sums over several programs: of B and C in grad_couplings
    (blocks, batch, length, 2, TILE), of A in (batch, chunks, TILE, dim), of D and bias in (batch, chunks, dim).
    """
    entry, chunk, channel = _place(dim, blocks, chunks, BLOCK)
    exists = channel < dim
    state, alike = tl.arange(0, TILE), tl.zeros((BLOCK, 1), tl.int32)
    of_route = tl.full((), 0, tl.int64) + route * dim
    low_weight = _low_weight(weight + of_route * RANK, channel, exists, RANK)
    exponent = finite(_rows(A + of_route * STATES, channel, state, exists, unit, STATES) * LOG2_E)
    shift = tl.load(bias + of_route + channel, mask=exists, other=0.0)
    skip = tl.load(D + of_route + channel, mask=exists, other=0.0)
    g_first, g_across, g_along = _walk(route, height, width, g_h, g_w, COLUMNS, BACKWARDS)
    x_first, x_across, x_along = _walk(route, height, width, x_h, x_w, COLUMNS, BACKWARDS)
    p_first, p_across, p_along = _walk(route, height, width, width * p_l, p_l, COLUMNS, BACKWARDS)
    gx_first, gx_across, gx_along = _walk(route, height, width, gx_h, gx_w, COLUMNS, BACKWARDS)
    first, across, along = _walk(route, height, width, width, 1, COLUMNS, BACKWARDS)  # in row-major order
    g_at, x_at = grad_y + entry * g_b + channel * g_d + g_first, x + entry * x_b + channel * x_d + x_first
    low_at = projections + entry * p_b + route * p_j + p_first
    B_at = projections + entry * p_b + route * p_j + p_first + (RANK + state[None, :] * unit + alike)
    gx_offset = entry * gx_b + channel * gx_d + gx_first
    known = (state < STATES)[None, :] if STATES < TILE else alike == 0
    tile = state[None, :] * dim + channel[:, None] * unit
    raster = entry * height * width + first
    batch = tl.num_programs(0) // blocks // chunks
    part = (tl.program_id(0) % blocks).to(tl.int64) * batch * height * width

    length, in_line, all_blocks = _lines(route, height, width, COLUMNS, STEPS)
    in_chunk = (all_blocks + chunks - 1) // chunks
    start, last = chunk * in_chunk, tl.minimum((chunk + 1) * in_chunk, all_blocks)
    kept = boundaries + entry * all_blocks * TILE * dim + tile
    h = tl.zeros((BLOCK, TILE), tl.float32)
    later = tl.zeros((BLOCK, TILE), tl.float32)  # from the following step
    of_chunk = ((entry * 4 + route) * chunks + chunk) * TILE * dim + tile
    if CHAINED:
        h = tl.load(starts + of_chunk, mask=exists[:, None], other=0.0)
        later = tl.load(adjoints + of_chunk, mask=exists[:, None], other=0.0)
    for block in range(start, last):
        line, t = block // in_line, block % in_line * STEPS
        tl.store(kept + (block + tl.full((), 0, tl.int64)) * TILE * dim, h, mask=exists[:, None])
        x_now = load_steps(x_at + line * x_across, t, length, x_along, exists, STEPS)
        low_now = _load_low(low_at + line * p_across, t, length, p_along, RANK, STEPS)
        B_now = load_steps(B_at + line * p_across, t, length, p_along, known, STEPS)
        for k in tl.static_range(STEPS):
            step, raw = _step_size(low_now, low_weight, shift, t + k < length, k, RANK)
            drive = step * x_now[k].to(tl.float32)
            h = tl.exp2(step[:, None] * exponent) * h + drive[:, None] * B_now[k].to(tl.float32)
    tl.debug_barrier()  # another thread may read a boundary than wrote it

    of_A = tl.zeros((BLOCK, TILE), tl.float32)
    of_D, of_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for back in range(start, last):
        block = start + last - 1 - back
        line, t = block // in_line, block % in_line * STEPS
        g_now = load_steps(g_at + line * g_across, t, length, g_along, exists, STEPS)
        x_now = load_steps(x_at + line * x_across, t, length, x_along, exists, STEPS)
        low_now = _load_low(low_at + line * p_across, t, length, p_along, RANK, STEPS)
        B_now = load_steps(B_at + line * p_across, t, length, p_along, known, STEPS)
        C_now = load_steps(B_at + STATES + line * p_across, t, length, p_along, known, STEPS)
        if before is not None:
            before_now = load_steps(before + gx_offset + line * gx_across, t, length, gx_along, exists, STEPS)
        h = tl.load(kept + (block + tl.full((), 0, tl.int64)) * TILE * dim, mask=exists[:, None], other=0.0)
        states, decays, steps, raws = (h,), (), (), ()
        for k in tl.static_range(STEPS):
            step, raw = _step_size(low_now, low_weight, shift, t + k < length, k, RANK)
            decay = tl.exp2(step[:, None] * exponent)
            drive = step * x_now[k].to(tl.float32)
            h = decay * h + drive[:, None] * B_now[k].to(tl.float32)
            states, decays, steps, raws = states + (h,), decays + (decay,), steps + (step,), raws + (raw,)
        for k in tl.static_range(STEPS - 1, -1, -1):
            valid = t + k < length
            value, g, step = x_now[k].to(tl.float32), g_now[k].to(tl.float32), steps[k]
            grad = later + g[:, None] * C_now[k].to(tl.float32)
            position = raster + line * across + (t + k) * along
            couplings = grad_couplings + (part + position) * 2 * TILE + state
            tl.store(couplings, tl.sum(grad * (step * value)[:, None], 0), mask=valid)
            tl.store(couplings + TILE, tl.sum(g[:, None] * states[k + 1], 0), mask=valid)
            of_drive = tl.sum(grad * B_now[k].to(tl.float32), 1)
            later = decays[k] * grad
            of_exponent = tl.where(valid, later * states[k], 0.0)  # states after the end may be NaN
            of_A += of_exponent * step[:, None]
            of_raw = (tl.sum(of_exponent * exponent, 1) * (1.0 / LOG2_E) + of_drive * value) * sigmoid(raws[k])
            of_raw = tl.where(valid, of_raw, 0.0)
            of_x = of_drive * step + g * skip
            if before is not None:
                of_x += before_now[k]
            of_D += g * value
            of_bias += of_raw
            inside = exists & valid
            tl.store(grad_raw + position * dim + channel, of_raw, mask=inside)
            offset = gx_offset + line * gx_across + (t + k) * gx_along
            tl.store(grad_x + offset, of_x.to(grad_x.dtype.element_ty), mask=inside)
    row = entry * chunks + chunk
    tl.store(grad_A + row * TILE * dim + tile, of_A, mask=exists[:, None])
    tl.store(grad_D + row * dim + channel, of_D, mask=exists)
    tl.store(grad_bias + row * dim + channel, of_bias, mask=exists)
