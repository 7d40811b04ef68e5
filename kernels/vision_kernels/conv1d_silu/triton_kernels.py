"""Triton kernels for the convolution with SiLU.

They are limited by memory bandwidth: a program computes a tile (time, channels) with one lane per channel, and reads it
again for each tap from the first-level cache.
"""

import triton
import triton.language as tl

from vision_kernels.triton_math import silu, silu_slope


@triton.jit
def _place(length, dim, time_blocks, channel_blocks, TIME: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the batch entry, the index of the block of time, the steps and the channels."""
    program = tl.program_id(0)
    channel = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    block = program // channel_blocks % time_blocks
    entry = (program // channel_blocks // time_blocks).to(tl.int64)
    return entry, block, block * TIME + tl.arange(0, TIME), channel.to(tl.int64)


@triton.jit
def _at(sequence, time, channel, length, dim, stride_t, stride_d):
    """Load float32 (time, channels), zeros beyond the ends."""
    inside = ((time >= 0) & (time < length))[:, None] & (channel < dim)[None, :]
    offset = time.to(tl.int64)[:, None] * stride_t + channel[None, :] * stride_d
    return tl.load(sequence + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _convolved(x, weight, time, channel, length, dim, x_t, x_d, TAPS: tl.constexpr):
    total = tl.zeros((time.shape[0], channel.shape[0]), tl.float32)
    for tap in tl.static_range(TAPS):
        of_tap = tl.load(weight + channel * TAPS + tap, mask=channel < dim, other=0.0)
        total += _at(x, time + (tap - (TAPS - 1) // 2), channel, length, dim, x_t, x_d) * of_tap[None, :]
    return total


@triton.jit
def conv_forward(
    x, weight, y, length, dim, time_blocks, channel_blocks, x_b, x_t, x_d,
    TAPS: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write y (batch, length, dim), contiguous."""
    entry, block, time, channel = _place(length, dim, time_blocks, channel_blocks, TIME, CHANNELS)
    total = _convolved(x + entry * x_b, weight, time, channel, length, dim, x_t, x_d, TAPS)
    offset = (entry * length + time)[:, None] * dim + channel[None, :]
    inside = (time < length)[:, None] & (channel < dim)[None, :]
    tl.store(y + offset, silu(total).to(y.dtype.element_ty), mask=inside)


@triton.jit
def conv_backward(
    grad_y, x, weight, grad_x, grad_weight, length, dim, time_blocks, channel_blocks, g_b, g_t, g_d, x_b, x_t, x_d,
    TAPS: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write grad_x (batch, length, dim), contiguous, and parts (batch, time_blocks, TAPS, dim) of grad_weight."""
    entry, block, time, channel = _place(length, dim, time_blocks, channel_blocks, TIME, CHANNELS)
    x += entry * x_b
    grad_y += entry * g_b
    total = tl.zeros((TIME, CHANNELS), tl.float32)
    part = grad_weight + (entry * time_blocks + block) * TAPS * dim + channel
    for tap in tl.static_range(TAPS):
        # x_t contributes to the output of step t - (tap - before), so its gradient comes from there.
        shift = tap - (TAPS - 1) // 2
        convolved = _convolved(x, weight, time - shift, channel, length, dim, x_t, x_d, TAPS)
        grad = _at(grad_y, time - shift, channel, length, dim, g_t, g_d) * silu_slope(convolved)
        total += grad * tl.load(weight + channel * TAPS + tap, mask=channel < dim, other=0.0)[None, :]
        if tap == (TAPS - 1) // 2:
            for other in tl.static_range(TAPS):
                seen = _at(x, time + (other - (TAPS - 1) // 2), channel, length, dim, x_t, x_d)
                tl.store(part + other * dim, tl.sum(grad * seen, 0), mask=channel < dim)
    offset = (entry * length + time)[:, None] * dim + channel[None, :]
    inside = (time < length)[:, None] & (channel < dim)[None, :]
    tl.store(grad_x + offset, total.to(grad_x.dtype.element_ty), mask=inside)
