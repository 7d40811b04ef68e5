"""The arguments of the operator."""

from typing import NamedTuple

from torch import Tensor


class ConvArguments(NamedTuple):
    """Arguments of the registered operator; its backward operator takes `grad_y` before them."""

    x: Tensor  # (batch, length, dim)
    weight: Tensor  # (dim, taps)
