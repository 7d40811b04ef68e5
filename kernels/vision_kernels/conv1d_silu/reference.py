"""The definition of the convolution with SiLU: one product for each tap."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.precision import compute_dtype


def _shifted(x: Tensor, tap: int, taps: int) -> Tensor:
    """x_{t + tap - (taps - 1) // 2} for all t, with zeros beyond both ends: (batch, length, dim) -> the same."""
    before = (taps - 1) // 2
    return F.pad(x, (0, 0, before, taps - 1 - before))[:, tap : tap + x.shape[1]]


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[1]
    return sum((_shifted(x, tap, taps) * weight[:, tap] for tap in range(taps)), torch.zeros_like(x))


def silu(x: Tensor) -> Tensor:
    """SiLU, whose value at minus infinity is its limit, -0."""
    return F.silu(x.clamp(min=torch.finfo(x.dtype).min))


def silu_slope(x: Tensor) -> Tensor:
    """The derivative of SiLU; at both infinities its limits, 0 and 1."""
    gate, limits = torch.sigmoid(x), torch.finfo(x.dtype)
    return gate * (1 + x.clamp(limits.min, limits.max) * (1 - gate))


def conv1d_silu_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Return (batch, length, dim) with the dtype of x; weight is (dim, taps)."""
    dtype = compute_dtype(x)
    return silu(_convolve(x.to(dtype), weight.to(dtype))).to(x.dtype)


def conv1d_silu_reference_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    dtype, taps = compute_dtype(x), weight.shape[1]
    wide, kernel = x.to(dtype), weight.to(dtype)
    grad = grad_y.to(dtype) * silu_slope(_convolve(wide, kernel))
    # What x_t gave to the output of step t - (tap - before) comes back from there.
    before = (taps - 1) // 2
    padded = F.pad(grad, (0, 0, taps - 1 - before, before))
    grad_x = sum(padded[:, taps - 1 - tap : taps - 1 - tap + x.shape[1]] * kernel[:, tap] for tap in range(taps))
    grad_weight = torch.stack([(grad * _shifted(wide, tap, taps)).sum((0, 1)) for tap in range(taps)], dim=1)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)
