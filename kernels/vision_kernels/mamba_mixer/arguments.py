"""The arguments of the operator."""

from typing import NamedTuple

from torch import Tensor


class MixerArguments(NamedTuple):
    """Arguments of the public function and of the registered operator."""

    xz: Tensor  # (batch, length, 2 inner)
    conv_weight: Tensor  # (2 inner, taps)
    x_proj_weight: Tensor  # (rank + 2 state, inner)
    dt_proj_weight: Tensor  # (inner, rank)
    dt_bias: Tensor  # (inner,)
    A: Tensor  # (inner, state)
    D: Tensor  # (inner,)
    delta_bias: Tensor  # (inner,)
