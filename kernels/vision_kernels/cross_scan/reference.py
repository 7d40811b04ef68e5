"""The definition of the routes: a table of the positions that each of them visits in turn."""

import torch
from torch import Tensor

from vision_kernels.cross_scan.routes import ROUTES, Route, summation_dtype


def _positions(height: int, width: int, routes: str, device: torch.device) -> Tensor:
    """Return the position in row-major order at each step of each route, (4, length)."""
    step = torch.arange(height * width, device=device)
    backwards = step.flip(0)

    def along(route: Route) -> Tensor:
        t = backwards if route.backwards else step
        return t % height * width + t // height if route.by_columns else t

    return torch.stack([along(route) for route in ROUTES[routes]])


def scan(x: Tensor, routes: str) -> Tensor:
    """Return (batch, 4, dim, length)."""
    _, _, height, width = x.shape
    positions = _positions(height, width, routes, x.device)
    return x.flatten(2)[:, :, positions].transpose(1, 2)


def merge(y: Tensor, height: int, width: int, routes: str) -> Tensor:
    """Return (batch, dim, length)."""
    total = torch.zeros_like(y[:, 0], dtype=summation_dtype(y))
    for positions, sequence in zip(_positions(height, width, routes, y.device), y.unbind(1), strict=True):
        total.index_add_(2, positions, sequence.to(total.dtype))
    return total.to(y.dtype)
