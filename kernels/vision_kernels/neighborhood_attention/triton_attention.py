"""Launches of the Triton kernels for neighborhood attention."""

import torch
from torch import Tensor

from vision_kernels.neighborhood_attention.arguments import AttentionArguments, Gradients
from vision_kernels.neighborhood_attention.dilation import backward_on_sub_grids, forward_on_sub_grids
from vision_kernels.neighborhood_attention.triton_kernels import (
    attention_backward_bias,
    attention_backward_key_value,
    attention_backward_query,
    attention_forward,
)
from vision_kernels.views import as_parameter, contiguous_like

_SIDE = 8  # of a tile
_LEAST_DIM = 16  # that tensor cores multiply


def forward(given: AttentionArguments) -> Tensor:
    """Return the output with the shape of query."""
    return forward_on_sub_grids(_forward, given)


def backward(grad_out: Tensor, given: AttentionArguments) -> Gradients:
    """Return the gradients of query, key, value and bias."""
    return backward_on_sub_grids(_backward, grad_out, given)


def _alike(*maps: Tensor) -> tuple[Tensor, ...]:
    """Return maps of one dtype; for Triton's interpreter, on the CPU, not bfloat16."""
    one_type = len({each.dtype for each in maps}) == 1
    interpreted = maps[0].device.type == "cpu" and maps[0].dtype == torch.bfloat16
    return maps if one_type and not interpreted else tuple(each.float() for each in maps)


def _sizes(query: Tensor) -> tuple[int, ...]:
    """Return the heads, the height and width, and the numbers of tiles along both."""
    _, heads, height, width, _ = query.shape
    return heads, height, width, -(-height // _SIDE), -(-width // _SIDE)


def _options(query: Tensor, kernel_size: int) -> dict[str, int]:
    """Return the constants of all kernels."""
    dim = query.shape[4]
    dims = max(_LEAST_DIM, 1 << (dim - 1).bit_length())
    # Large heads leave no shared memory for prefetching.
    warps, stages = (4, 3) if dims <= 32 else (8, 1)
    constants = {"KERNEL": kernel_size, "DIM": dim, "DIMS": dims, "ROWS": _SIDE, "COLUMNS": _SIDE}
    return constants | {"num_warps": warps, "num_stages": stages}


def _products(element: Tensor) -> dict[str, int | str]:
    """Return how many keys (or queries) are multiplied with a tile at a time, and in which precision.

    float32 takes three products of TensorFloat-32 if the GPU has it, whose error is negligible.
    """
    if element.dtype != torch.float32:
        return {"KEYS": 64, "PRECISION": "ieee"}
    cores = element.device.type == "cuda" and torch.cuda.get_device_capability(element.device) >= (8, 0)
    return {"KEYS": 32, "PRECISION": "tf32x3" if cores else "ieee"}


def _strides(*maps: Tensor) -> tuple[int, ...]:
    return tuple(stride for each in maps for stride in each.stride())


def _forward(given: AttentionArguments) -> Tensor:
    query, out = given.query, contiguous_like(given.query)
    maps, bias = _alike(*given[:3]), as_parameter(given.bias)
    *_, row_tiles, column_tiles = sizes = _sizes(query)
    grid = (query.shape[0] * query.shape[1] * row_tiles * column_tiles,)
    options = _options(query, given.kernel_size) | _products(maps[0])
    with torch.cuda.device_of(query):
        attention_forward[grid](*maps, bias, out, *sizes, *_strides(*maps), **options)
    return out


def _backward(grad_out: Tensor, given: AttentionArguments) -> Gradients:
    query = given.query
    grad_query, grad_key, grad_value = grads = tuple(contiguous_like(each) for each in given[:3])
    maps, bias = _alike(grad_out, *given[:3]), as_parameter(given.bias)
    *_, row_tiles, column_tiles = sizes = _sizes(query)
    batch, heads = query.shape[:2]
    grid = (batch * heads * row_tiles * column_tiles,)
    statistics = tuple(query.new_empty(query.shape[:4], dtype=torch.float32) for _ in range(2))
    rest, options = (*sizes, *_strides(*maps)), _options(query, given.kernel_size)
    products = options | _products(maps[0])
    with torch.cuda.device_of(query):
        attention_backward_query[grid](*maps, bias, grad_query, *statistics, *rest, **products)
        attention_backward_key_value[grid](*maps, bias, *statistics, grad_key, grad_value, *rest, **products)
        if bias is None:
            return *grads, None
        # Each tile has its own part, and the parts are summed in a fixed order.
        parts = bias.new_zeros(batch, heads, row_tiles * column_tiles, *bias.shape[1:])
        attention_backward_bias[grid](*maps, bias, *statistics, parts, *rest, **options)
    return *grads, parts.sum((0, 2))
