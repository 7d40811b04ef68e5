"""Neighborhood attention by the CUDA kernels (csrc/cuda/neighborhood_attention*.cu)."""

import functools

import torch
from torch import Tensor

from vision_kernels.arguments import GPU_DTYPES, why_not_dtypes
from vision_kernels.cuda import Library, shared_bytes
from vision_kernels.neighborhood_attention.arguments import AttentionArguments, Gradients
from vision_kernels.neighborhood_attention.dilation import backward_on_sub_grids, forward_on_sub_grids
from vision_kernels.views import as_parameter, contiguous_like

_MAX_DIM = 64
_MAX_KERNEL_SIZE = 31  # the tables of the backward pass for larger windows exceed shared memory
_SQUARE = 16  # positions of a warp
_WARPS = 4096  # approximate number of warps among which the backward pass divides the queries; a GPU runs some 1600
_WARPS_OF_BLOCK = 4  # kMaxWarps in csrc/cuda/neighborhood.cuh


def why_unable(given: AttentionArguments) -> str | None:
    """Return why the kernels do not support these arguments, or None if they do."""
    query, key, value, bias, kernel_size, _ = given
    if reason := why_not_dtypes("computes", GPU_DTYPES, query.dtype, key.dtype, value.dtype):
        return reason
    if query.shape[4] > _MAX_DIM:
        return f"takes head_dim up to {_MAX_DIM}, not {query.shape[4]}"
    if kernel_size > _MAX_KERNEL_SIZE:
        return f"takes kernel_size up to {_MAX_KERNEL_SIZE}, not {kernel_size}"
    if bias is not None:
        partners = -(-((kernel_size + 3) ** 2) // 16) * 16
        bytes_of_warp = 4 * (16 * partners + (2 * kernel_size - 1) ** 2)
        if bytes_of_warp > shared_bytes(query.device):
            return f"the GPU has too little shared memory for kernel_size {kernel_size} with a bias"
    return None


def forward(library: Library, given: AttentionArguments) -> Tensor:
    """Return the output with the shape of query."""
    return forward_on_sub_grids(functools.partial(_forward, library), given)


def backward(library: Library, grad_out: Tensor, given: AttentionArguments) -> Gradients:
    """Return the gradients of query, key, value and bias."""
    return backward_on_sub_grids(functools.partial(_backward, library), grad_out, given)


def _readable(*maps: Tensor) -> list[Tensor]:
    """Return maps of one dtype whose vectors have adjacent elements."""
    alike = len({each.dtype for each in maps}) == 1
    converted = maps if alike else [each.float() for each in maps]
    return [each if each.stride(4) == 1 else each.contiguous() for each in converted]


def _forward(library: Library, given: AttentionArguments) -> Tensor:
    maps = _readable(*given[:3])
    out = contiguous_like(maps[0])
    library.call("neighborhood_attention_forward", *maps, as_parameter(given.bias), out, given.kernel_size)
    return out


def _backward(library: Library, grad_out: Tensor, given: AttentionArguments) -> Gradients:
    maps, bias, new = _readable(grad_out, *given[:3]), as_parameter(given.bias), given.query.new_empty
    grads = [contiguous_like(each) for each in maps[1:]]
    batch, heads, height, width, _ = given.query.shape
    statistics = new(2, batch * heads, height, width, dtype=torch.float32)
    squares = -(-batch * height * width // _SQUARE)
    warps = max(1, min(squares, _WARPS // heads) // _WARPS_OF_BLOCK) * _WARPS_OF_BLOCK
    tables = None if bias is None else new(heads, warps, *bias.shape[1:], dtype=torch.float32)
    outputs = (statistics, *grads, tables, given.kernel_size, warps)
    library.call("neighborhood_attention_backward", *maps, bias, *outputs)
    grad_query, grad_key, grad_value = grads
    return grad_query, grad_key, grad_value, None if tables is None else tables.sum(1)
