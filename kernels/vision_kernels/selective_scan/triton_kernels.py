"""Triton kernels for the selective scan.

A program scans one block of channels of one batch entry, step by step, and keeps the states in registers as a tile
(channels, states) with one channel per lane, so that the sum over states stays within a lane, and B and C are the same
for all lanes. A serial scan is faster than an associative scan over time even for short sequences: it takes one
multiply-add per step and state instead of several and exchanges between lanes, while batch x channels keep the GPU
busy. The inputs of a block of steps are loaded during the previous block, because there are too few warps to hide the
latency of memory otherwise.

If batch x channels are few and sequences long, time is split into chunks: first the end states of chunks that start
from zero are computed, then the start states that follow from these (`chain`), and last the outputs. This computes each
exponential twice.

Tuples contain one tile for each step of a block; loops over them are unrolled.

Triton derives the layout of lanes from the loads. If it knew that states are adjacent in memory, or channels of a tile,
it would distribute states over lanes, for shorter loads but much more arithmetic. So the strides of tiles are unknown
to it, even `unit`, which is 1. It may know them only if `VECTOR` says that one load brings all states of B or C.
"""

import triton
import triton.language as tl

from vision_kernels.triton_math import LOG2_E, finite, load_steps, sigmoid, softplus

# Specializing on 1 and on multiples of 16 would compile every kernel again, without better code.
_SIZES = ("length", "blocks", "chunks", "chunk_steps")


@triton.jit
def _place(dim, share, blocks, chunks, BLOCK: tl.constexpr):
    """Return the batch entry, chunk, group and channels, and which channels exist."""
    program = tl.program_id(0)
    block = program % blocks
    chunk = program // blocks % chunks
    entry = (program // blocks // chunks).to(tl.int64)
    in_group = (share + BLOCK - 1) // BLOCK
    group = block // in_group
    within = block % in_group * BLOCK + tl.arange(0, BLOCK)
    return entry, chunk, group, (group * share + within).to(tl.int64), within < share


@triton.jit
def _exponents(A, channel, state, exists, unit, STATES: tl.constexpr):
    """Return A (channels, states) times log2(e), for powers of two."""
    at = A + channel[:, None] * STATES + state[None, :] * unit
    return finite(tl.load(at, mask=exists[:, None] & (state < STATES)[None, :], other=0.0) * LOG2_E)


@triton.jit
def _coupled(state, STATES: tl.constexpr, BLOCK: tl.constexpr):
    """Return (BLOCK, 1) zeros, which broadcast offsets of B and C to all lanes, and which states exist."""
    alike = tl.zeros((BLOCK, 1), tl.int32)
    return alike, (state < STATES)[None, :] if STATES < state.shape[0] else alike == 0


@triton.jit
def _step_size(delta, bias, valid, SOFTPLUS: tl.constexpr):
    """Return the step size after bias and softplus, zero for missing steps, and the argument of the softplus."""
    raw = delta.to(tl.float32) + bias
    step = softplus(raw) if SOFTPLUS else raw
    return tl.where(valid, step, 0.0), raw


@triton.jit(do_not_specialize=["unit", "B_n", "C_n", *_SIZES])
def scan_forward(
    u, delta, A, B, C, D, bias, y, totals, states,
    length, dim, share, blocks, chunks, chunk_steps, unit,
    u_b, u_d, u_t, delta_b, delta_d, delta_t, B_b, B_g, B_n, B_t, C_b, C_g, C_n, C_t, y_b, y_d, y_t,
    STATES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
    VECTOR: tl.constexpr, OUTPUT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Write y; or, without `OUTPUT`, the sum of steps and the end state of each chunk.

    totals is (batch, chunks, dim), and states (batch, chunks, TILE, dim): where `CHAINED`, the start of each chunk.
    """
    entry, chunk, group, channel, exists = _place(dim, share, blocks, chunks, BLOCK)
    state = tl.arange(0, TILE)
    exponent = _exponents(A, channel, state, exists, unit, STATES)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + channel, mask=exists, other=0.0)
    if OUTPUT and D is not None:
        skip = tl.load(D + channel, mask=exists, other=0.0)
    alike, known = _coupled(state, STATES, BLOCK)
    u_at, delta_at = u + entry * u_b + channel * u_d, delta + entry * delta_b + channel * delta_d
    B_at = B + entry * B_b + group * B_g + (state[None, :] * (1 if VECTOR else B_n) + alike)
    C_at = C + entry * C_b + group * C_g + (state[None, :] * (1 if VECTOR else C_n) + alike)
    row = entry * chunks + chunk
    of_chunk = row * TILE * dim + (state[None, :] * dim + channel[:, None] * unit)

    start = chunk * chunk_steps
    stop = tl.minimum(start + chunk_steps, length)
    h = tl.zeros((BLOCK, TILE), tl.float32)
    if CHAINED:
        h = tl.load(states + of_chunk, mask=exists[:, None], other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    u_next = load_steps(u_at, start, stop, u_t, exists, STEPS)
    delta_next = load_steps(delta_at, start, stop, delta_t, exists, STEPS)
    B_next = load_steps(B_at, start, stop, B_t, known, STEPS)
    if OUTPUT:
        C_next = load_steps(C_at, start, stop, C_t, known, STEPS)
    for t in range(start, stop, STEPS):
        u_now, delta_now, B_now = u_next, delta_next, B_next
        u_next = load_steps(u_at, t + STEPS, stop, u_t, exists, STEPS)
        delta_next = load_steps(delta_at, t + STEPS, stop, delta_t, exists, STEPS)
        B_next = load_steps(B_at, t + STEPS, stop, B_t, known, STEPS)
        if OUTPUT:
            C_now = C_next
            C_next = load_steps(C_at, t + STEPS, stop, C_t, known, STEPS)
        for k in tl.static_range(STEPS):
            step, raw = _step_size(delta_now[k], shift, t + k < stop, SOFTPLUS)
            x = u_now[k].to(tl.float32)
            h = tl.exp2(step[:, None] * exponent) * h + (step * x)[:, None] * B_now[k].to(tl.float32)
            if OUTPUT:
                out = tl.sum(h * C_now[k].to(tl.float32), 1)
                if D is not None:
                    out += skip * x
                offset = entry * y_b + channel * y_d + (t + k + tl.full((), 0, tl.int64)) * y_t
                tl.store(y + offset, out.to(y.dtype.element_ty), mask=exists & (t + k < stop))
            else:
                total += step
    if not OUTPUT:
        tl.store(states + of_chunk, h, mask=exists[:, None])
        tl.store(totals + row * dim + channel, total, mask=exists)


@triton.jit(do_not_specialize=["unit", "C_n", *_SIZES])
def scan_adjoint(
    grad_y, delta, A, C, bias, adjoints,
    length, dim, share, blocks, chunks, chunk_steps, unit,
    g_b, g_d, g_t, delta_b, delta_d, delta_t, C_b, C_g, C_n, C_t,
    STATES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Write what each chunk contributes to the gradient of the states before it, with nothing from later chunks."""
    entry, chunk, group, channel, exists = _place(dim, share, blocks, chunks, BLOCK)
    state = tl.arange(0, TILE)
    exponent = _exponents(A, channel, state, exists, unit, STATES)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + channel, mask=exists, other=0.0)
    alike, known = _coupled(state, STATES, BLOCK)
    g_at, delta_at = grad_y + entry * g_b + channel * g_d, delta + entry * delta_b + channel * delta_d
    C_at = C + entry * C_b + group * C_g + (state[None, :] * (1 if VECTOR else C_n) + alike)
    start = chunk * chunk_steps
    stop = tl.minimum(start + chunk_steps, length)
    handed = tl.zeros((BLOCK, TILE), tl.float32)
    steps = (stop - start + STEPS - 1) // STEPS
    for block in range(0, steps):
        t = start + (steps - 1 - block) * STEPS
        g_now = load_steps(g_at, t, stop, g_t, exists, STEPS)
        delta_now = load_steps(delta_at, t, stop, delta_t, exists, STEPS)
        C_now = load_steps(C_at, t, stop, C_t, known, STEPS)
        for k in tl.static_range(STEPS - 1, -1, -1):
            step, raw = _step_size(delta_now[k], shift, t + k < stop, SOFTPLUS)
            grad = handed + g_now[k].to(tl.float32)[:, None] * C_now[k].to(tl.float32)
            handed = tl.exp2(step[:, None] * exponent) * grad
    at = adjoints + (entry * chunks + chunk) * TILE * dim + (state[None, :] * dim + channel[:, None] * unit)
    tl.store(at, handed, mask=exists[:, None])


@triton.jit(do_not_specialize=["unit", "blocks", "chunks"])
def chain(
    totals, states, A, dim, blocks, chunks, rows, unit,
    STATES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Replace the state that each chunk reaches from zero by the state from which it starts.

    `A` is (rows, dim, STATES), and batch entries take its rows in turn.
    """
    program = tl.program_id(0)
    channel = (program % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    entry = (program // blocks).to(tl.int64)
    exists = channel < dim
    state = tl.arange(0, TILE)
    exponent = _exponents(A + entry % rows * dim * STATES, channel, state, exists, unit, STATES)
    totals_at = totals + entry * chunks * dim + channel
    states_at = states + entry * chunks * TILE * dim + (state[None, :] * dim + channel[:, None] * unit)
    # If BACKWARDS, from the last chunk to the first.
    sign = 1
    if BACKWARDS:
        sign = -1
        last = chunks - 1 + tl.full((), 0, tl.int64)
        totals_at += last * dim
        states_at += last * TILE * dim
    h = tl.zeros((BLOCK, TILE), tl.float32)
    for first in range(0, chunks, STEPS):
        total = load_steps(totals_at, first, chunks, sign * dim, exists, STEPS)
        handed = load_steps(states_at, first, chunks, sign * TILE * dim, exists[:, None], STEPS)
        for k in tl.static_range(STEPS):
            offset = (first + k + tl.full((), 0, tl.int64)) * (sign * TILE * dim)
            tl.store(states_at + offset, h, mask=exists[:, None] & (first + k < chunks))
            h = tl.exp2(total[k][:, None] * exponent) * h + handed[k]


@triton.jit(do_not_specialize=["unit", "B_n", "C_n", *_SIZES, "all_steps"])
def scan_backward(
    grad_y, u, delta, A, B, C, D, bias, starts, adjoints, boundaries,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
    length, dim, share, blocks, chunks, chunk_steps, unit, all_steps,
    g_b, g_d, g_t, u_b, u_d, u_t, delta_b, delta_d, delta_t, B_b, B_g, B_n, B_t, C_b, C_g, C_n, C_t,
    gu_b, gu_d, gu_t, gd_b, gd_d, gd_t,
    STATES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
    VECTOR: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Write the gradients, as partial sums where several programs contribute.

    First forwards, keeping the state before each block of steps in boundaries (batch, all_steps, TILE, dim); then
    backwards, computing the states inside of a block again. Parts: of A (batch, chunks, TILE, dim), D and bias (batch,
    chunks, dim), B and C (batch, blocks, length, TILE). Blocks of channels never cross groups.
    """
    entry, chunk, group, channel, exists = _place(dim, share, blocks, chunks, BLOCK)
    state = tl.arange(0, TILE)
    exponent = _exponents(A, channel, state, exists, unit, STATES)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + channel, mask=exists, other=0.0)
    if D is not None:
        skip = tl.load(D + channel, mask=exists, other=0.0)
    alike, known = _coupled(state, STATES, BLOCK)
    g_at, u_at = grad_y + entry * g_b + channel * g_d, u + entry * u_b + channel * u_d
    delta_at = delta + entry * delta_b + channel * delta_d
    B_at = B + entry * B_b + group * B_g + (state[None, :] * (1 if VECTOR else B_n) + alike)
    C_at = C + entry * C_b + group * C_g + (state[None, :] * (1 if VECTOR else C_n) + alike)
    tile = state[None, :] * dim + channel[:, None] * unit
    row = entry * chunks + chunk
    of_chunk = row * TILE * dim + tile
    start = chunk * chunk_steps
    stop = tl.minimum(start + chunk_steps, length)
    steps = (stop - start + STEPS - 1) // STEPS
    kept = boundaries + (entry * all_steps + start // STEPS) * TILE * dim + tile

    h = tl.zeros((BLOCK, TILE), tl.float32)
    later = tl.zeros((BLOCK, TILE), tl.float32)  # from the following step
    if CHAINED:
        h = tl.load(starts + of_chunk, mask=exists[:, None], other=0.0)
        later = tl.load(adjoints + of_chunk, mask=exists[:, None], other=0.0)
    for block in range(0, steps):
        t = start + block * STEPS
        tl.store(kept + (block + tl.full((), 0, tl.int64)) * TILE * dim, h, mask=exists[:, None])
        u_now = load_steps(u_at, t, stop, u_t, exists, STEPS)
        delta_now = load_steps(delta_at, t, stop, delta_t, exists, STEPS)
        B_now = load_steps(B_at, t, stop, B_t, known, STEPS)
        for k in tl.static_range(STEPS):
            step, raw = _step_size(delta_now[k], shift, t + k < stop, SOFTPLUS)
            drive = step * u_now[k].to(tl.float32)
            h = tl.exp2(step[:, None] * exponent) * h + drive[:, None] * B_now[k].to(tl.float32)
    tl.debug_barrier()  # another thread may read a boundary than wrote it

    of_A = tl.zeros((BLOCK, TILE), tl.float32)
    of_D, of_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    part = (entry * blocks + tl.program_id(0) % blocks) * length * TILE + state
    for block in range(0, steps):
        before = steps - 1 - block
        t = start + before * STEPS
        g_now = load_steps(g_at, t, stop, g_t, exists, STEPS)
        u_now = load_steps(u_at, t, stop, u_t, exists, STEPS)
        delta_now = load_steps(delta_at, t, stop, delta_t, exists, STEPS)
        B_now = load_steps(B_at, t, stop, B_t, known, STEPS)
        C_now = load_steps(C_at, t, stop, C_t, known, STEPS)
        h = tl.load(kept + (before + tl.full((), 0, tl.int64)) * TILE * dim, mask=exists[:, None], other=0.0)
        states, decays = (h,), ()
        for k in tl.static_range(STEPS):
            step, raw = _step_size(delta_now[k], shift, t + k < stop, SOFTPLUS)
            decay = tl.exp2(step[:, None] * exponent)
            drive = step * u_now[k].to(tl.float32)
            h = decay * h + drive[:, None] * B_now[k].to(tl.float32)
            states, decays = states + (h,), decays + (decay,)
        for k in tl.static_range(STEPS - 1, -1, -1):
            valid = t + k < stop
            step, raw = _step_size(delta_now[k], shift, valid, SOFTPLUS)
            x, g = u_now[k].to(tl.float32), g_now[k].to(tl.float32)
            grad = later + g[:, None] * C_now[k].to(tl.float32)
            offset = t + k + tl.full((), 0, tl.int64)
            tl.store(grad_C + part + offset * TILE, tl.sum(g[:, None] * states[k + 1], 0), mask=valid)
            tl.store(grad_B + part + offset * TILE, tl.sum(grad * (step * x)[:, None], 0), mask=valid)
            of_drive = tl.sum(grad * B_now[k].to(tl.float32), 1)
            later = decays[k] * grad
            of_exponent = tl.where(valid, later * states[k], 0.0)  # states after the end may be NaN
            of_A += of_exponent * step[:, None]
            of_step = tl.sum(of_exponent * exponent, 1) * (1.0 / LOG2_E) + of_drive * x
            if SOFTPLUS:
                of_step *= sigmoid(raw)
            of_step = tl.where(valid, of_step, 0.0)
            of_u = of_drive * step
            if D is not None:
                of_u += g * skip
                of_D += g * x
            of_bias += of_step
            here = exists & valid
            tl.store(
                grad_u + entry * gu_b + channel * gu_d + offset * gu_t, of_u.to(grad_u.dtype.element_ty), mask=here
            )
            tl.store(
                grad_delta + entry * gd_b + channel * gd_d + offset * gd_t,
                of_step.to(grad_delta.dtype.element_ty),
                mask=here,
            )
    tl.store(grad_A + of_chunk, of_A, mask=exists[:, None])
    if D is not None:
        tl.store(grad_D + row * dim + channel, of_D, mask=exists)
    if bias is not None:
        tl.store(grad_bias + row * dim + channel, of_bias, mask=exists)
