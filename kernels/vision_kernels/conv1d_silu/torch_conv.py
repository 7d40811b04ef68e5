"""Convolution and SiLU by PyTorch's own convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.conv1d_silu.arguments import ConvArguments
from vision_kernels.conv1d_silu.reference import silu, silu_slope
from vision_kernels.precision import compute_dtype


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Return (batch, dim, length) with the dtype of x, from (batch, length, dim) and (dim, taps)."""
    return F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), padding="same", groups=x.shape[2])


def forward(given: ConvArguments) -> Tensor:
    """Return (batch, length, dim)."""
    x, weight = given
    dtype = compute_dtype(x)
    return silu(_convolve(x.to(dtype), weight.to(dtype))).transpose(1, 2)


def backward(grad_y: Tensor, given: ConvArguments) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    x, weight = given
    dtype = compute_dtype(x)
    wide, kernel = x.to(dtype), weight.to(dtype)
    taps, dim = weight.shape[1], x.shape[2]
    grad = grad_y.to(dtype).transpose(1, 2) * silu_slope(_convolve(wide, kernel))
    # For an odd number of taps the gradient of the input is the convolution with the mirrored kernel; for an even one
    # it is also shifted by a step, which the explicit padding accounts for.
    before, after = taps // 2, (taps - 1) // 2
    grad_x = F.conv1d(F.pad(grad, (before, after)), kernel.flip(1).unsqueeze(1), groups=dim)
    padded = F.pad(wide.transpose(1, 2), (after, before))
    grad_weight = torch.stack([(grad * padded[:, :, tap : tap + x.shape[1]]).sum((0, 2)) for tap in range(taps)], dim=1)
    return grad_x.transpose(1, 2), grad_weight
