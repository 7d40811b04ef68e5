"""Convolution and SiLU in CUDA C++ (csrc/cuda/conv1d_silu.cu), for any mixture of float32, float16 and bfloat16."""

import torch
from torch import Tensor

from vision_kernels.conv1d_silu.arguments import ConvArguments
from vision_kernels.cuda import Library
from vision_kernels.views import contiguous_like

_SPAN = 128  # steps over which one block sums the gradient of the weight


def forward(library: Library, given: ConvArguments) -> Tensor:
    """Return (batch, length, dim)."""
    y = contiguous_like(given.x)
    library.call("conv1d_silu_forward", *given, y)
    return y


def backward(library: Library, grad_y: Tensor, given: ConvArguments) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    x, weight = given
    grad_x, grad_weight = contiguous_like(x), contiguous_like(weight)
    spans = -(-x.shape[1] // _SPAN)
    parts = weight.new_empty(x.shape[0] * spans, *weight.shape, dtype=torch.float32)
    library.call("conv1d_silu_backward", grad_y, x, weight, grad_x, grad_weight, parts, _SPAN)
    return grad_x, grad_weight
