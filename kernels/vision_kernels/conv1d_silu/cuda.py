"""Convolution and SiLU in CUDA C++ (csrc/cuda/conv1d_silu.cu), for float32, float16 and bfloat16 in any mixture."""

import torch
from torch import Tensor

from vision_kernels.cuda import Library

_SPAN = 128  # steps whose contribution to the gradient of the weight is summed up by one block


def conv1d_silu_cuda(library: Library, x: Tensor, weight: Tensor) -> Tensor:
    """Return (batch, length, dim) with the dtype of x."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    library.call("conv1d_silu_forward", x, weight, y)
    return y


def conv1d_silu_cuda_backward(library: Library, grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    grad_x, grad_weight = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (x, weight))
    spans = -(-x.shape[1] // _SPAN)
    parts = weight.new_empty(x.shape[0] * spans, *weight.shape, dtype=torch.float32)
    library.call("conv1d_silu_backward", grad_y, x, weight, grad_x, grad_weight, parts, _SPAN)
    return grad_x, grad_weight
