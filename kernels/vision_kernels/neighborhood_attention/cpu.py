"""Neighborhood attention by the compiled CPU kernels (csrc/cpu/neighborhood_attention.cpp)."""

import functools

import torch
from torch import Tensor

from vision_kernels.native import Library
from vision_kernels.neighborhood_attention.arguments import AttentionArguments, Gradients
from vision_kernels.neighborhood_attention.dilation import backward_on_sub_grids, forward_on_sub_grids
from vision_kernels.views import contiguous_like, in_dtype


def forward(library: Library, given: AttentionArguments) -> Tensor:
    """Return the output with the shape of query."""
    return forward_on_sub_grids(functools.partial(_forward, library), given)


def backward(library: Library, grad_out: Tensor, given: AttentionArguments) -> Gradients:
    """Return the gradients of query, key, value and bias."""
    return backward_on_sub_grids(functools.partial(_backward, library), grad_out, given)


def _readable(*maps: Tensor) -> tuple[Tensor, ...]:
    """Return maps of one dtype, bfloat16 or float32."""
    alike = all(each.dtype == torch.bfloat16 for each in maps)
    return maps if alike else tuple(in_dtype(each, torch.float32) for each in maps)


def _forward(library: Library, given: AttentionArguments) -> Tensor:
    maps = _readable(*given[:3])
    out, bias = contiguous_like(maps[0]), None if given.bias is None else given.bias.float()
    library.call("neighborhood_attention_forward", *maps, bias, out, given.kernel_size)
    return out


def _backward(library: Library, grad_out: Tensor, given: AttentionArguments) -> Gradients:
    query, key, value, bias, kernel_size, _ = given
    maps, bias = _readable(grad_out, query, key, value), None if bias is None else bias.float()
    grad_query, grad_key, grad_value = (contiguous_like(each, torch.float32) for each in (query, key, value))
    grad_bias = None if bias is None else contiguous_like(bias)
    grads = (grad_query, grad_key.zero_(), grad_value.zero_(), grad_bias)
    library.call("neighborhood_attention_backward", *maps, bias, *grads, kernel_size)
    return grads
