"""The arguments of the operator, and its two layouts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]  # of u, delta, A, B, C, D and delta_bias; None where one is absent


class ScanSizes(NamedTuple):
    """Sizes of a scan in either layout."""

    batch: int
    length: int
    dim: int
    groups: int
    states: int


class ScanArguments(NamedTuple):
    """Arguments of the registered operator; its backward operator takes `grad_y` before them."""

    u: Tensor  # (batch, dim, length); (batch, length, dim) with channels last
    delta: Tensor  # as u
    A: Tensor  # (dim, state)
    B: Tensor  # (batch, groups, state, length); (batch, length, groups, state) with channels last
    C: Tensor  # as B
    D: Tensor | None  # (dim,)
    delta_bias: Tensor | None  # (dim,)
    delta_softplus: bool
    channels_last: bool
    out_dtype: torch.dtype

    def sizes(self) -> ScanSizes:
        if self.channels_last:
            (batch, length, dim), groups = self.u.shape, self.B.shape[2]
        else:
            (batch, dim, length), groups = self.u.shape, self.B.shape[1]
        return ScanSizes(batch, length, dim, groups, self.A.shape[1])

    def in_layout(self, *, channels_last: bool) -> "ScanArguments":
        """Return views of the tensors in a layout."""
        if channels_last == self.channels_last:
            return self
        source, target = (-1, 1) if channels_last else (1, -1)
        u, delta, B, C = (each.movedim(source, target) for each in (self.u, self.delta, self.B, self.C))
        return self._replace(u=u, delta=delta, B=B, C=C, channels_last=channels_last)


def channels_first(forward: Callable[[ScanArguments], Tensor]) -> Callable[[ScanArguments], Tensor]:
    """Make a function of arguments with channels first accept both layouts."""

    def either(given: ScanArguments) -> Tensor:
        y = forward(given.in_layout(channels_last=False))
        return y.movedim(-1, 1) if given.channels_last else y

    return either


def channels_first_backward(
    backward: Callable[[Tensor, ScanArguments], Gradients],
) -> Callable[[Tensor, ScanArguments], Gradients]:
    """Make a function that computes gradients with channels first accept both layouts."""

    def either(grad_y: Tensor, given: ScanArguments) -> Gradients:
        if not given.channels_last:
            return backward(grad_y, given)
        grads = backward(grad_y.movedim(1, -1), given.in_layout(channels_last=False))
        return tuple(each.movedim(-1, 1) if each is not None and each.ndim > 2 else each for each in grads)

    return either
