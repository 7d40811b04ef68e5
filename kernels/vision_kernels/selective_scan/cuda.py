"""Selective scan in CUDA C++ (csrc/cuda/selective_scan.h): float32, float16 and bfloat16 in any mixture and layout."""

import torch
from torch import Tensor

from vision_kernels.cuda import Library
from vision_kernels.native import why_not_float32

_MOST_STATES = 16
_BLOCK_CHANNELS = 32
_TILE_STEPS = 8  # between the states that the backward pass keeps
# Sequences are cut into chunks that run side by side if there are too few channels to occupy a GPU. Fixed numbers, so
# that results do not depend on the GPU.
_BLOCKS = 1024
_SHORTEST_CHUNK = 256
_CHUNK_STEPS = 16  # a chunk is a multiple of it


def why_unable(*arguments: object) -> str | None:
    """Return why the kernels cannot compute these arguments of the operator, or None if they can."""
    states = arguments[2].shape[1]
    if not 1 <= states <= _MOST_STATES:
        return f"has registers for 1 to {_MOST_STATES} states, and A has {states}"
    return why_not_float32(*arguments)


def selective_scan_cuda(
    library: Library, u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last, out_dtype
) -> Tensor:
    """Return y with the shape of u. Shapes as in the operator."""
    dtype = torch.float32 if out_dtype == torch.float64 else out_dtype
    y = torch.empty_like(u, dtype=dtype, memory_format=torch.contiguous_format)
    chunk, chunks = _chunks(u, B, channels_last)
    ends, totals = _chunk_states(u, A, chunks), _chunk_sums(u, A, chunks)
    inputs = (u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last)
    library.call("selective_scan_forward", *inputs, y, chunk, ends, totals)
    return y.to(out_dtype)


def selective_scan_cuda_backward(
    library: Library, grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the seven tensor inputs (None where an optional input is absent)."""
    chunk, chunks = _chunks(u, B, channels_last)
    length = u.shape[1 if channels_last else 2]
    groups, blocks = _blocks(u, B, channels_last)
    grads = [
        None if each is None else torch.empty_like(each, memory_format=torch.contiguous_format)
        for each in (u, delta, A, B, C, D, delta_bias)
    ]
    copies = (chunks * u.shape[0], blocks, blocks, chunks * u.shape[0], chunks * u.shape[0])  # for A, B, C, D, bias
    parts = [
        None if grad is None else grad.new_empty(count, *grad.shape, dtype=torch.float32)
        for grad, count in zip(grads[2:], copies, strict=True)
    ]
    tiles = chunks * -(-min(chunk, length) // _TILE_STEPS)
    states = next(count for count in (1, 4, 8, _MOST_STATES) if A.shape[1] <= count)
    checkpoints = A.new_empty(u.shape[0] * groups * blocks, tiles, states, _BLOCK_CHANNELS, dtype=torch.float32)
    starts, carries = (_chunk_states(u, A, chunks) for _ in range(2))
    grad_y = grad_y.float() if grad_y.dtype == torch.float64 else grad_y
    inputs = (grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last, chunk)
    workspace = (checkpoints, starts, carries, _chunk_sums(u, A, chunks))
    library.call("selective_scan_backward", *inputs, *grads, *parts, *workspace)
    return tuple(grads)


def _blocks(u: Tensor, B: Tensor, channels_last: bool) -> tuple[int, int]:
    """Return the groups, and the blocks of channels of one."""
    groups, dim = B.shape[2 if channels_last else 1], u.shape[2 if channels_last else 1]
    return groups, -(-(dim // groups) // _BLOCK_CHANNELS)


def _chunks(u: Tensor, B: Tensor, channels_last: bool) -> tuple[int, int]:
    """Return the steps of a chunk and how many chunks there are, at least one."""
    groups, blocks = _blocks(u, B, channels_last)
    length = u.shape[1 if channels_last else 2]
    evenly = -(-length * u.shape[0] * groups * blocks // _BLOCKS)
    chunk = -(-max(evenly, _SHORTEST_CHUNK) // _CHUNK_STEPS) * _CHUNK_STEPS
    return chunk, max(1, -(-length // chunk))


def _chunk_states(u: Tensor, A: Tensor, chunks: int) -> Tensor | None:
    return A.new_empty(chunks, u.shape[0], *A.shape, dtype=torch.float32) if chunks > 1 else None


def _chunk_sums(u: Tensor, A: Tensor, chunks: int) -> Tensor | None:
    return A.new_empty(chunks, u.shape[0], A.shape[0], dtype=torch.float32) if chunks > 1 else None
