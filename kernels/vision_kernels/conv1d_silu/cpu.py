"""Convolution and SiLU in C++ (csrc/cpu/conv1d_silu.cpp), for float32 and bfloat16; other dtypes are converted."""

import torch
from torch import Tensor

from vision_kernels.conv1d_silu.arguments import ConvArguments
from vision_kernels.native import Library
from vision_kernels.views import contiguous_like, in_dtype

_STEPS_PER_TASK = 32


def forward(library: Library, given: ConvArguments) -> Tensor:
    """Return (batch, length, dim)."""
    x, weight = _readable(given)
    y = contiguous_like(x)
    library.call("conv1d_silu_forward", x, weight, y, _chunks(x))
    return y


def backward(library: Library, grad_y: Tensor, given: ConvArguments) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    x, weight = _readable(given)
    grad_y = _channels_adjacent(in_dtype(grad_y, x.dtype))
    grad_x, parts = contiguous_like(x), weight.new_empty(x.shape[0], _chunks(x), *weight.t().shape)
    library.call("conv1d_silu_backward", grad_y, x, weight, grad_x, parts, _chunks(x))
    return grad_x, parts.sum((0, 1)).t()


def _chunks(x: Tensor) -> int:
    """Return the number of tasks along time, a function of the shape alone: sums are the same on any machine."""
    return max(1, x.shape[1] // _STEPS_PER_TASK)


def _readable(given: ConvArguments) -> tuple[Tensor, Tensor]:
    x, weight = given
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return _channels_adjacent(in_dtype(x, dtype)), in_dtype(weight, torch.float32)


def _channels_adjacent(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
