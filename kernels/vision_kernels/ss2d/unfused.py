"""SS2D composed of its parts, around a given selective scan. With the reference scan it is the definition."""

from collections.abc import Callable

import torch
from torch import Tensor

from vision_kernels.cross_scan import torch_routes
from vision_kernels.cross_scan.routes import ROUTES
from vision_kernels.precision import compute_dtype
from vision_kernels.selective_scan.arguments import ScanArguments
from vision_kernels.ss2d.arguments import Ss2dArguments


def forward(scan: Callable[[ScanArguments], Tensor], given: Ss2dArguments) -> Tensor:
    """Return y (batch, dim, height, width), by the forward function of a selective scan."""
    _, _, height, width = given.x.shape
    _, sequences = scan_arguments(*given[:-1])
    y = scan(_channels_first(sequences)).unflatten(1, (4, -1))
    return torch_routes.merge(y, height, width, given.routes).view(given.x.shape)


def backward(scan_backward: Callable, grad_y: Tensor, given: Ss2dArguments) -> tuple[Tensor, ...]:
    """Return the gradients of the six tensors, by the backward function of a selective scan."""
    _, _, height, width = given.x.shape
    routes, (low, sequences) = given.routes, scan_arguments(*given[:-1])
    grad_sequence = torch_routes.scan(grad_y.to(low.dtype), routes).flatten(1, 2)
    grads = scan_backward(grad_sequence, _channels_first(sequences))
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias = grads
    grad_delta = grad_delta.unflatten(1, (4, -1))  # (batch, 4, dim, length)
    grad_low = torch.einsum("bkdl,kdr->bkrl", grad_delta, given.dt_weight.to(low.dtype))
    grad_projections = _raster_order(torch.cat([grad_low, grad_B, grad_C], dim=2), height, width, routes)
    grad_x = torch_routes.merge(grad_u.unflatten(1, (4, -1)), height, width, routes).view(given.x.shape)
    grad_weight = torch.einsum("bkdl,bkrl->kdr", grad_delta, low)
    return grad_x, grad_projections.permute(0, 3, 1, 2), grad_weight, grad_bias.view(4, -1), grad_A, grad_D


def _channels_first(sequences: tuple[Tensor, ...]) -> ScanArguments:
    u, delta, A, B, C, D, bias = sequences
    return ScanArguments(u, delta, A, B, C, D, bias, delta_softplus=True, channels_last=False, out_dtype=u.dtype)


def scan_arguments(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the low-rank step sizes (batch, 4, rank, length) and the tensors of the scan, in compute precision."""
    dtype = compute_dtype(x)
    rank, states = dt_weight.shape[2], A.shape[1]
    maps = projections.to(dtype).permute(0, 2, 3, 1).unflatten(3, x.shape[2:])  # (batch, 4, rank + 2 states, ...)
    maps = torch.stack([route.scan(each) for route, each in zip(ROUTES[routes], maps.unbind(1), strict=True)], dim=1)
    low, B, C = maps.split([rank, states, states], dim=2)
    u = torch_routes.scan(x.to(dtype), routes).flatten(1, 2)
    delta = torch.einsum("bkrl,kdr->bkdl", low, dt_weight.to(dtype)).flatten(1, 2)
    return low, (u, delta, A.to(dtype), B, C, D.to(dtype), dt_bias.to(dtype).flatten())


def _raster_order(sequences: Tensor, height: int, width: int, routes: str) -> Tensor:
    """Undo the order of each route: (batch, 4, channels, length) -> the same."""
    pairs = zip(ROUTES[routes], sequences.unbind(1), strict=True)
    return torch.stack([route.merge(each, height, width).flatten(2) for route, each in pairs], dim=1)
