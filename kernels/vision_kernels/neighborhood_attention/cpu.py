"""Neighborhood attention by the compiled kernels, csrc/cpu/neighborhood_attention.cpp."""

import functools

import torch
from torch import Tensor

from vision_kernels import native
from vision_kernels.neighborhood_attention.dilation import backward_on_sub_grids, forward_on_sub_grids


def _readable(*maps: Tensor) -> tuple[Tensor, ...]:
    """The kernels read maps of one type, float32 or bfloat16."""
    alike = all(each.dtype == torch.bfloat16 for each in maps)
    return maps if alike else tuple(each.float() for each in maps)


def _forward(instruction_set: str, query, key, value, bias, kernel_size: int) -> Tensor:
    maps = _readable(query, key, value)
    out = torch.empty_like(maps[0], memory_format=torch.contiguous_format)
    bias = None if bias is None else bias.float()
    native.call("neighborhood_attention_forward", instruction_set, *maps, bias, out, kernel_size)
    return out.to(query.dtype)


def _backward(instruction_set: str, grad_out, query, key, value, bias, kernel_size: int) -> tuple[Tensor | None, ...]:
    """Return gradients in float32."""
    maps = _readable(grad_out, query, key, value)
    contiguous = {"dtype": torch.float32, "memory_format": torch.contiguous_format}
    grad_query = torch.empty_like(query, **contiguous)
    grad_key, grad_value = torch.zeros_like(key, **contiguous), torch.zeros_like(value, **contiguous)
    grad_bias = None if bias is None else torch.empty_like(bias, **contiguous)
    bias = None if bias is None else bias.float()
    grads = (grad_query, grad_key, grad_value, grad_bias)
    native.call("neighborhood_attention_backward", instruction_set, *maps, bias, *grads, kernel_size)
    return grads


def neighborhood_attention_cpu(instruction_set: str, *arguments) -> Tensor:
    """Return the output with the shape and dtype of query. Shapes as in `vision_kernels.neighborhood_attention`."""
    return forward_on_sub_grids(functools.partial(_forward, instruction_set), *arguments)


def neighborhood_attention_cpu_backward(instruction_set: str, *arguments) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and bias (None without a bias)."""
    return backward_on_sub_grids(functools.partial(_backward, instruction_set), *arguments)
