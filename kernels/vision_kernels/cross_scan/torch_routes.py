"""Cross scan and cross merge in PyTorch: transpositions and flips."""

import torch
from torch import Tensor

from vision_kernels.cross_scan.routes import ROUTES, summation_dtype


def scan(x: Tensor, routes: str) -> Tensor:
    """Return (batch, 4, dim, length)."""
    return torch.stack([route.scan(x) for route in ROUTES[routes]], dim=1)


def merge(y: Tensor, height: int, width: int, routes: str) -> Tensor:
    """Return (batch, dim, length)."""
    first, *others = (route.merge(each, height, width) for route, each in zip(ROUTES[routes], y.unbind(1), strict=True))
    return sum(others, first.to(summation_dtype(y))).to(y.dtype).flatten(2)
