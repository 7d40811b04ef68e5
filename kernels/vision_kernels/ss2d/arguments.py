"""The arguments of the operator, and the memory format of its images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vision_kernels.arguments import why_not_dtypes


class Ss2dArguments(NamedTuple):
    """Arguments of the registered operator; its backward operator takes `grad_y` before them."""

    x: Tensor  # (batch, dim, height, width)
    # (batch, length, 4, rank + 2 states) in row-major order: for each route the low-rank step size, B and C
    projections: Tensor
    dt_weight: Tensor  # (4, dim, rank)
    dt_bias: Tensor  # (4, dim)
    A: Tensor  # (4 dim, states)
    D: Tensor  # (4 dim,)
    routes: str
    out_dtype: torch.dtype


def why_unable(supported: Sequence[torch.dtype], given: Ss2dArguments) -> str | None:
    """Return why kernels for these dtypes of images do not support the arguments, or None if they do."""
    return why_not_dtypes("computes", supported, given.x.dtype, given.out_dtype)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return channels last if the channels of `x` are adjacent, as in a slice of such an image, else contiguous."""
    return torch.channels_last if x.stride(1) == 1 and not x.is_contiguous() else torch.contiguous_format


def empty_image(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate an image with the shape and memory format of `x`."""
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format_of(x))
