"""Selective scan in CUDA C++ (csrc/cuda/selective_scan.h), for any mixture of float32, float16 and bfloat16."""

import torch
from torch import Tensor

from vision_kernels.cuda import Library
from vision_kernels.native import why_not_float32
from vision_kernels.selective_scan.arguments import Gradients, ScanArguments, ScanSizes
from vision_kernels.views import contiguous_like

_MOST_STATES = 16
_BLOCK_CHANNELS = 32
_TILE_STEPS = 8  # between the states that the backward pass keeps
# Sequences are split into chunks that run in parallel if there are too few channels to occupy a GPU. The numbers are
# fixed, so that results do not depend on the GPU.
_BLOCKS = 1024
_SHORTEST_CHUNK = 256
_CHUNK_STEPS = 16  # a chunk is a multiple of it


def why_unable(given: ScanArguments) -> str | None:
    """Return why the kernels do not support these arguments, or None if they do."""
    states = given.A.shape[1]
    if not 1 <= states <= _MOST_STATES:
        return f"has registers for 1 to {_MOST_STATES} states, and A has {states}"
    return why_not_float32(given)


def forward(library: Library, given: ScanArguments) -> Tensor:
    """Return y with the shape of u."""
    sizes = given.sizes()
    chunk, chunks = _chunks(sizes)
    y = contiguous_like(given.u, torch.float32 if given.out_dtype == torch.float64 else given.out_dtype)
    states, sums = _chunk_states(given, chunks), _chunk_sums(given, chunks)
    library.call("selective_scan_forward", *given[:-1], y, chunk, states, sums)
    return y


def backward(library: Library, grad_y: Tensor, given: ScanArguments) -> Gradients:
    """Return the gradients of the tensors."""
    sizes = given.sizes()
    (chunk, chunks), blocks, new = _chunks(sizes), _blocks(sizes), given.A.new_empty
    grads = [None if each is None else contiguous_like(each) for each in given[:7]]
    copies = (chunks * sizes.batch, blocks, blocks, chunks * sizes.batch, chunks * sizes.batch)  # for A, B, C, D, bias
    parts = [
        None if grad is None else new(count, *grad.shape, dtype=torch.float32)
        for grad, count in zip(grads[2:], copies, strict=True)
    ]
    tiles = chunks * -(-min(chunk, sizes.length) // _TILE_STEPS)
    states = next(count for count in (1, 4, 8, _MOST_STATES) if sizes.states <= count)
    checkpoints = new(sizes.batch * sizes.groups * blocks, tiles, states, _BLOCK_CHANNELS, dtype=torch.float32)
    starts, carries = (_chunk_states(given, chunks) for _ in range(2))
    grad_y = grad_y.float() if grad_y.dtype == torch.float64 else grad_y
    workspace = (checkpoints, starts, carries, _chunk_sums(given, chunks))
    library.call("selective_scan_backward", grad_y, *given[:-1], chunk, *grads, *parts, *workspace)
    return tuple(grads)


def _blocks(sizes: ScanSizes) -> int:
    """Return the number of blocks of channels of one group."""
    return -(-(sizes.dim // sizes.groups) // _BLOCK_CHANNELS)


def _chunks(sizes: ScanSizes) -> tuple[int, int]:
    """Return the number of steps of a chunk, and the number of chunks, at least one."""
    evenly = -(-sizes.length * sizes.batch * sizes.groups * _blocks(sizes) // _BLOCKS)
    chunk = -(-max(evenly, _SHORTEST_CHUNK) // _CHUNK_STEPS) * _CHUNK_STEPS
    return chunk, max(1, -(-sizes.length // chunk))


def _chunk_states(given: ScanArguments, chunks: int) -> Tensor | None:
    A = given.A
    return A.new_empty(chunks, given.u.shape[0], *A.shape, dtype=torch.float32) if chunks > 1 else None


def _chunk_sums(given: ScanArguments, chunks: int) -> Tensor | None:
    A = given.A
    return A.new_empty(chunks, given.u.shape[0], A.shape[0], dtype=torch.float32) if chunks > 1 else None
