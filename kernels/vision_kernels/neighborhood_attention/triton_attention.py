"""Neighborhood attention by Triton: how the kernels are launched."""

import torch
from torch import Tensor

from vision_kernels.neighborhood_attention.dilation import backward_on_sub_grids, forward_on_sub_grids
from vision_kernels.neighborhood_attention.triton_kernels import (
    attention_backward_bias,
    attention_backward_key_value,
    attention_backward_query,
    attention_forward,
)

_SIDE = 8  # of a tile
_LEAST_DIM = 16  # of what tensor cores multiply


def neighborhood_attention_triton(*arguments) -> Tensor:
    """Return the output with the shape and dtype of query. Shapes as in `vision_kernels.neighborhood_attention`."""
    return forward_on_sub_grids(_forward, *arguments)


def neighborhood_attention_triton_backward(*arguments) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and bias (None without a bias)."""
    return backward_on_sub_grids(_backward, *arguments)


def _alike(*maps: Tensor) -> tuple[Tensor, ...]:
    """The kernels multiply maps of one type; Triton's interpreter, on the CPU, not those of bfloat16."""
    one_type = len({each.dtype for each in maps}) == 1
    interpreted = maps[0].device.type == "cpu" and maps[0].dtype == torch.bfloat16
    return maps if one_type and not interpreted else tuple(each.float() for each in maps)


def _sizes(query: Tensor) -> tuple[int, ...]:
    """Return heads, height, width and the numbers of tiles along both."""
    _, heads, height, width, _ = query.shape
    return heads, height, width, -(-height // _SIDE), -(-width // _SIDE)


def _options(query: Tensor, kernel_size: int) -> dict[str, int]:
    """The constants of all kernels."""
    dim = query.shape[4]
    dims = max(_LEAST_DIM, 1 << (dim - 1).bit_length())
    # Large heads leave no shared memory for loads ahead of their use.
    warps, stages = (4, 3) if dims <= 32 else (8, 1)
    constants = {"KERNEL": kernel_size, "DIM": dim, "DIMS": dims, "ROWS": _SIDE, "COLUMNS": _SIDE}
    return constants | {"num_warps": warps, "num_stages": stages}


def _products(element: Tensor) -> dict[str, int | str]:
    """How matrices are multiplied: how many keys (or queries) at a time with a tile, and in which precision.

    float32 in three products of TensorFloat-32, which lose nothing that counts, where the GPU has it.
    """
    if element.dtype != torch.float32:
        return {"KEYS": 64, "PRECISION": "ieee"}
    cores = element.device.type == "cuda" and torch.cuda.get_device_capability(element.device) >= (8, 0)
    return {"KEYS": 32, "PRECISION": "tf32x3" if cores else "ieee"}


def _strides(*maps: Tensor) -> tuple[int, ...]:
    return tuple(stride for each in maps for stride in each.stride())


def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernel_size: int) -> Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if out.numel():
        maps, bias = _alike(query, key, value), None if bias is None else bias.float().contiguous()
        *_, row_tiles, column_tiles = sizes = _sizes(query)
        grid = (query.shape[0] * query.shape[1] * row_tiles * column_tiles,)
        with torch.cuda.device_of(query):
            attention_forward[grid](
                *maps, bias, out, *sizes, *_strides(*maps), **_options(query, kernel_size), **_products(maps[0])
            )
    return out


def _backward(grad_out, query, key, value, bias, kernel_size: int) -> tuple[Tensor | None, ...]:
    grads = tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value))
    if query.numel() == 0:
        return *grads, None if bias is None else torch.zeros_like(bias)
    grad_query, grad_key, grad_value = grads
    maps, bias = _alike(grad_out, query, key, value), None if bias is None else bias.float().contiguous()
    *_, row_tiles, column_tiles = sizes = _sizes(query)
    batch, heads = query.shape[:2]
    grid = (batch * heads * row_tiles * column_tiles,)
    normalizer, overlap = (query.new_empty(query.shape[:4], dtype=torch.float32) for _ in range(2))
    rest = (*sizes, *_strides(*maps))
    options = _options(query, kernel_size)
    with torch.cuda.device_of(query):
        attention_backward_query[grid](
            *maps, bias, grad_query, normalizer, overlap, *rest, **options, **_products(maps[0])
        )
        attention_backward_key_value[grid](
            *maps, bias, normalizer, overlap, grad_key, grad_value, *rest, **options, **_products(maps[0])
        )
        if bias is None:
            return *grads, None
        # Of each tile its own part, added up in a fixed order.
        parts = bias.new_zeros(batch, heads, row_tiles * column_tiles, *bias.shape[1:])
        attention_backward_bias[grid](*maps, bias, normalizer, overlap, parts, *rest, **options)
    return *grads, parts.sum((0, 2))
