"""The mixer as a chain of operators: its definition, and what runs where gradients are needed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.conv1d_silu import conv1d_silu
from vision_kernels.selective_scan import selective_scan


def mamba_mixer_composed(
    xz: Tensor,
    conv_weight: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """Return (batch, length, 2 inner) with the dtype of `xz`. Shapes as in the operator."""
    rank, states = dt_proj_weight.shape[1], A.shape[1]
    x, z = conv1d_silu(xz, conv_weight).chunk(2, dim=-1)
    dt, B, C = F.linear(x, x_proj_weight).split([rank, states, states], dim=-1)
    delta = F.linear(dt, dt_proj_weight, dt_bias)
    y = selective_scan(x, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True, channels_last=True)
    return torch.cat([y, z], dim=-1)
