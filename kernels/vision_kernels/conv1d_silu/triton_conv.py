"""Convolution and SiLU by Triton: how the kernels are launched."""

import torch
from torch import Tensor

from vision_kernels.conv1d_silu.triton_kernels import conv_backward, conv_forward

# A tile of eight elements for each thread: with channels adjacent in 16 bits, one load of 16 bytes.
_TIME, _CHANNELS, _WARPS = 16, 64, 4


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    _, length, dim = x.shape
    return length, dim, -(-length // _TIME), -(-dim // _CHANNELS)


def _options(weight: Tensor) -> dict[str, int]:
    return {"TAPS": weight.shape[1], "TIME": _TIME, "CHANNELS": _CHANNELS, "num_warps": _WARPS}


def conv1d_silu_triton(x: Tensor, weight: Tensor) -> Tensor:
    """Return (batch, length, dim) with the dtype of x."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        *_, time_blocks, channel_blocks = sizes = _sizes(x)
        with torch.cuda.device_of(x):
            conv_forward[(x.shape[0] * time_blocks * channel_blocks,)](
                x, weight.float().contiguous(), y, *sizes, *x.stride(), **_options(weight)
            )
    return y


def conv1d_silu_triton_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    *_, time_blocks, channel_blocks = sizes = _sizes(x)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = weight.new_empty(x.shape[0], time_blocks, weight.shape[1], x.shape[2], dtype=torch.float32)
    if x.numel():
        maps = (grad_y, x, weight.float().contiguous(), grad_x, parts)
        with torch.cuda.device_of(x):
            conv_backward[(x.shape[0] * time_blocks * channel_blocks,)](
                *maps, *sizes, *grad_y.stride(), *x.stride(), **_options(weight)
            )
    return grad_x, parts.sum((0, 1)).t().to(weight.dtype)
