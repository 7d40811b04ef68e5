"""The mixer as a chain of operators: its definition, which also runs if gradients are needed."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.conv1d_silu import conv1d_silu
from vision_kernels.mamba_mixer.arguments import MixerArguments
from vision_kernels.selective_scan import selective_scan
from vision_kernels.views import in_dtype


def mamba_mixer_composed(*arguments: Tensor) -> Tensor:
    """Return (batch, length, 2 inner) with the dtype of `xz`, from `MixerArguments`."""
    xz, conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D, delta_bias = MixerArguments(*arguments)
    x_proj, dt_proj = partial(_linear, weight=x_proj_weight), partial(_linear, weight=dt_proj_weight, bias=dt_bias)
    return compose_mixer(xz, conv_weight, x_proj, dt_proj, A, D, delta_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a layer whose parameters may have other dtypes than x, as in the fused kernel."""
    return F.linear(x, in_dtype(weight, x.dtype), None if bias is None else in_dtype(bias, x.dtype))


def compose_mixer(
    xz: Tensor,
    conv_weight: Tensor,
    x_proj: Callable[[Tensor], Tensor],
    dt_proj: Callable[[Tensor], Tensor],
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """Return the same for layers instead of weights. A layer may be more than a product and a bias, such as an adapter.

    Args:
        xz: (batch, length, 2 inner); this and the other tensors as in the operator.
        conv_weight: (2 inner, taps).
        x_proj: (batch, length, inner) -> (batch, length, rank + 2 state).
        dt_proj: (batch, length, rank) -> (batch, length, inner).
        A: (inner, state).
        D: (inner,).
        delta_bias: (inner,).
    """
    x, z = conv1d_silu(xz, conv_weight).chunk(2, dim=-1)
    low, states = x_proj(x), A.shape[1]
    dt, B, C = low.split([low.shape[2] - 2 * states, states, states], dim=-1)
    y = selective_scan(x, dt_proj(dt), A, B, C, D, delta_bias=delta_bias, delta_softplus=True, channels_last=True)
    return torch.cat([y, z], dim=-1)
