"""Convolution and SiLU in C++ (csrc/cpu/conv1d_silu.cpp), for float32 and bfloat16; other types are converted."""

import torch
from torch import Tensor

from vision_kernels import native

_STEPS_PER_TASK = 32


def conv1d_silu_cpu(instruction_set: str, x: Tensor, weight: Tensor) -> Tensor:
    """Return (batch, length, dim) with the dtype of x."""
    source, kernel = _inputs(x, weight)
    y = torch.empty_like(source, memory_format=torch.contiguous_format)
    native.call("conv1d_silu_forward", instruction_set, source, kernel, y, _chunks(x))
    return y.to(x.dtype)


def conv1d_silu_cpu_backward(instruction_set: str, grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    source, kernel = _inputs(x, weight)
    grad_y = _channels_adjacent(grad_y.to(source.dtype))
    grad_x = torch.empty_like(source, memory_format=torch.contiguous_format)
    partial = kernel.new_empty(x.shape[0], _chunks(x), *kernel.t().shape)
    native.call("conv1d_silu_backward", instruction_set, grad_y, source, kernel, grad_x, partial, _chunks(x))
    return grad_x.to(x.dtype), partial.sum((0, 1)).t().to(weight.dtype)


def _chunks(x: Tensor) -> int:
    """Time is cut into as many tasks; a function of the shape alone, so that sums are the same on any machine."""
    return max(1, x.shape[1] // _STEPS_PER_TASK)


def _inputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x if x.dtype == torch.bfloat16 else x.float()
    return _channels_adjacent(x), weight.float()


def _channels_adjacent(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
