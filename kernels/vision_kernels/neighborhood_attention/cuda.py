"""Neighborhood attention by the CUDA kernels, csrc/cuda/neighborhood_attention*.cu."""

import functools

import torch
from torch import Tensor

from vision_kernels.cuda import Library, shared_bytes
from vision_kernels.neighborhood_attention.dilation import backward_on_sub_grids, forward_on_sub_grids

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIM = 64
_MAX_KERNEL_SIZE = 31  # beyond, the tables of the backward pass do not fit into shared memory
_SQUARE = 16  # positions of a warp
_WARPS = 4096  # to which the backward pass shares out the queries, about; a GPU runs some 1600 together
_WARPS_OF_BLOCK = 4  # kMaxWarps in csrc/cuda/neighborhood.cuh


def why_unable(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernel_size: int, *others) -> str | None:
    """Return why the kernels cannot compute this, or None if they can."""
    unable = [each.dtype for each in (query, key, value) if each.dtype not in _DTYPES]
    if unable:
        return f"computes float32, float16 and bfloat16, not {unable[0]}"
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


def _readable(*maps: Tensor) -> list[Tensor]:
    """The kernels read maps of one type, the dimensions of whose vectors are adjacent."""
    alike = len({each.dtype for each in maps}) == 1
    maps = maps if alike else [each.float() for each in maps]
    return [each if each.stride(4) == 1 else each.contiguous() for each in maps]


def _forward(library: Library, query, key, value, bias, kernel_size: int) -> Tensor:
    maps = _readable(query, key, value)
    out = torch.empty_like(maps[0], memory_format=torch.contiguous_format)
    bias = None if bias is None else bias.float().contiguous()
    library.call("neighborhood_attention_forward", *maps, bias, out, kernel_size)
    return out.to(query.dtype)


def _backward(library: Library, grad_out, query, key, value, bias, kernel_size: int) -> tuple[Tensor | None, ...]:
    """Return gradients in the common type of the inputs, that of the bias in float32."""
    maps = _readable(grad_out, query, key, value)
    grads = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in maps[1:]]
    batch, heads, height, width, _ = query.shape
    statistics = query.new_empty(2, batch * heads, height, width, dtype=torch.float32)
    squares = -(-batch * height * width // _SQUARE)
    warps = max(1, min(squares, _WARPS // max(1, heads)) // _WARPS_OF_BLOCK) * _WARPS_OF_BLOCK
    tables = None
    if bias is not None:
        tables = query.new_empty(heads, warps, *bias.shape[1:], dtype=torch.float32)
        bias = bias.float().contiguous()
    library.call("neighborhood_attention_backward", *maps, bias, statistics, *grads, tables, kernel_size, warps)
    return *grads, None if tables is None else tables.sum(1)


def neighborhood_attention_cuda(library: Library, *arguments) -> Tensor:
    """Return the output with the shape and dtype of query. Shapes as in `vision_kernels.neighborhood_attention`."""
    return forward_on_sub_grids(functools.partial(_forward, library), *arguments)


def neighborhood_attention_cuda_backward(library: Library, *arguments) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and bias (None without a bias)."""
    return backward_on_sub_grids(functools.partial(_backward, library), *arguments)
