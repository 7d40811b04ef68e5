"""Cross scan and cross merge by the CUDA kernels (csrc/cuda/cross_scan.cu)."""

import torch
from torch import Tensor

from vision_kernels.cross_scan.routes import ROUTES
from vision_kernels.cuda import Library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_unable(leading: Tensor, *others: object) -> str | None:
    """Return why the kernels cannot compute this, or None if they can."""
    return None if leading.dtype in _DTYPES else f"moves float32, float16 and bfloat16, not {leading.dtype}"


def cross_scan_cuda(library: Library, x: Tensor, routes: str) -> Tensor:
    """Return (batch, 4, dim, length)."""
    batch, dim, height, width = x.shape
    if 1 not in (x.stride(2), x.stride(3)):
        x = x.contiguous()
    y = x.new_empty(batch, 4, dim, height * width)
    library.call("cross_scan_forward", x, y, *(route.step(width) for route in ROUTES[routes]))
    return y


def cross_merge_cuda(library: Library, y: Tensor, height: int, width: int, routes: str) -> Tensor:
    """Return (batch, dim, length)."""
    if y.stride(3) != 1:
        y = y.contiguous()
    x = y.new_empty(y.shape[0], y.shape[2], height, width)
    library.call("cross_merge_forward", y, x, *(route.step(width) for route in ROUTES[routes]))
    return x.flatten(2)
