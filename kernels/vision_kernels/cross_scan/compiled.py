"""Cross scan and cross merge by the compiled kernels (csrc/cpu/cross_scan.cpp and csrc/cuda/cross_scan.cu)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_kernels import cuda, native
from vision_kernels.arguments import why_not_dtypes
from vision_kernels.cross_scan.routes import ROUTES


def why_unable(supported: Sequence[torch.dtype], tensor: Tensor) -> str | None:
    """Return why kernels for these dtypes cannot move a tensor, or None if they can."""
    return why_not_dtypes("moves", supported, tensor.dtype)


def scan(library: native.Library | cuda.Library, x: Tensor, routes: str) -> Tensor:
    """Return (batch, 4, dim, length)."""
    batch, dim, height, width = x.shape
    if 1 not in (x.stride(2), x.stride(3)):
        x = x.contiguous()
    y = x.new_empty(batch, 4, dim, height * width)
    library.call("cross_scan_forward", x, y, *(route.step(width) for route in ROUTES[routes]))
    return y


def merge(library: native.Library | cuda.Library, y: Tensor, height: int, width: int, routes: str) -> Tensor:
    """Return (batch, dim, length)."""
    if y.stride(3) != 1:
        y = y.contiguous()
    x = y.new_empty(y.shape[0], y.shape[2], height, width)
    library.call("cross_merge_forward", y, x, *(route.step(width) for route in ROUTES[routes]))
    return x.flatten(2)
