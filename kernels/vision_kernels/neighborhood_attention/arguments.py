"""The arguments of the operator."""

from typing import NamedTuple

from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]  # of query, key, value and bias


class AttentionArguments(NamedTuple):
    """Arguments of the registered operator; its backward operator takes `grad_out` before them."""

    query: Tensor  # (batch, heads, height, width, head_dim)
    key: Tensor  # as query
    value: Tensor  # as query
    bias: Tensor | None  # (heads, 2 kernel_size - 1, 2 kernel_size - 1)
    kernel_size: int
    dilation: int
