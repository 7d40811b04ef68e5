"""The definition of the convolution with SiLU: one product per tap."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.conv1d_silu.arguments import ConvArguments
from vision_kernels.precision import compute_dtype


def _shifted(x: Tensor, tap: int, taps: int) -> Tensor:
    """Return x_{t + tap - (taps - 1) // 2} for all t, with zeros beyond both ends, in the shape of x."""
    before = (taps - 1) // 2
    return F.pad(x, (0, 0, before, taps - 1 - before))[:, tap : tap + x.shape[1]]


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[1]
    return sum((_shifted(x, tap, taps) * weight[:, tap] for tap in range(taps)), torch.zeros_like(x))


def silu(x: Tensor) -> Tensor:
    """Return SiLU, with its limit -0 at minus infinity."""
    return F.silu(x.clamp(min=torch.finfo(x.dtype).min))


def silu_slope(x: Tensor) -> Tensor:
    """Return the derivative of SiLU, with its limits 0 and 1 at the infinities."""
    gate, limits = torch.sigmoid(x), torch.finfo(x.dtype)
    return gate * (1 + x.clamp(limits.min, limits.max) * (1 - gate))


def forward(given: ConvArguments) -> Tensor:
    """Return (batch, length, dim)."""
    dtype = compute_dtype(given.x)
    return silu(_convolve(given.x.to(dtype), given.weight.to(dtype)))


def backward(grad_y: Tensor, given: ConvArguments) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    dtype, length, taps = compute_dtype(given.x), given.x.shape[1], given.weight.shape[1]
    x, weight = given.x.to(dtype), given.weight.to(dtype)
    grad = grad_y.to(dtype) * silu_slope(_convolve(x, weight))
    # x_t contributes to the output of step t - (tap - before), so its gradient comes from there.
    before = (taps - 1) // 2
    padded, grad_x = F.pad(grad, (0, 0, taps - 1 - before, before)), torch.zeros_like(x)
    for tap in range(taps):
        grad_x = grad_x + padded[:, taps - 1 - tap : taps - 1 - tap + length] * weight[:, tap]
    grad_weight = torch.stack([(grad * _shifted(x, tap, taps)).sum((0, 1)) for tap in range(taps)], dim=1)
    return grad_x, grad_weight
