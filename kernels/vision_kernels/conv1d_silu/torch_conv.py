"""Convolution and SiLU by PyTorch's own convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.conv1d_silu.reference import silu, silu_slope
from vision_kernels.precision import compute_dtype


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """(batch, length, dim), (dim, taps) -> (batch, dim, length), in x's dtype."""
    return F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), padding="same", groups=x.shape[2])


def conv1d_silu_torch(x: Tensor, weight: Tensor) -> Tensor:
    """Return (batch, length, dim) with the dtype of x."""
    dtype = compute_dtype(x)
    return silu(_convolve(x.to(dtype), weight.to(dtype))).transpose(1, 2).to(x.dtype)


def conv1d_silu_torch_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    dtype = compute_dtype(x)
    wide, kernel = x.to(dtype), weight.to(dtype)
    taps, dim = weight.shape[1], x.shape[2]
    grad = grad_y.to(dtype).transpose(1, 2) * silu_slope(_convolve(wide, kernel))
    # For an odd number of taps the gradient of the input is the convolution with the mirrored kernel; for an even one
    # it also moves by a step, which padding by hand covers.
    before, after = taps // 2, (taps - 1) // 2
    grad_x = F.conv1d(F.pad(grad, (before, after)), kernel.flip(1).unsqueeze(1), groups=dim)
    padded = F.pad(wide.transpose(1, 2), (after, before))
    grad_weight = torch.stack([(grad * padded[:, :, tap : tap + x.shape[1]]).sum((0, 2)) for tap in range(taps)], dim=1)
    return grad_x.transpose(1, 2).to(x.dtype), grad_weight.to(weight.dtype)
