"""SS2D composed of its parts, around a given selective scan. With the reference scan it is the definition.

Shapes: x (batch, dim, height, width); projections (batch, length, 4, rank + 2 states), in row-major order, holding for
each route the step size in low rank, B and C; dt_weight (4, dim, rank); dt_bias (4, dim); A (4 dim, states); D (4 dim).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vision_kernels.cross_scan.routes import ROUTES
from vision_kernels.cross_scan.torch_routes import cross_merge_torch, cross_scan_torch
from vision_kernels.precision import compute_dtype


def ss2d_unfused(
    scan: Callable,
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return y (batch, dim, height, width) of `out_dtype`, by the forward function of a selective scan."""
    height, width = x.shape[2:]
    _, sequences = scan_arguments(x, projections, dt_weight, dt_bias, A, D, routes)
    y = scan(*sequences, True, sequences[0].dtype).unflatten(1, (4, -1))
    return cross_merge_torch(y, height, width, routes).view(x.shape).to(out_dtype)


def ss2d_unfused_backward(
    scan_backward: Callable,
    grad_y: Tensor,
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: str,
) -> tuple[Tensor, ...]:
    """Return the gradients of the six tensors from x to D, by the backward function of a selective scan."""
    height, width = x.shape[2:]
    low, sequences = scan_arguments(x, projections, dt_weight, dt_bias, A, D, routes)
    grad_sequence = cross_scan_torch(grad_y.to(sequences[0].dtype), routes).flatten(1, 2)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias = scan_backward(grad_sequence, *sequences, True)
    grad_delta = grad_delta.unflatten(1, (4, -1))  # (batch, 4, dim, length)
    grad_low = torch.einsum("bkdl,kdr->bkrl", grad_delta, dt_weight.to(low.dtype))
    grad_projections = _raster_order(torch.cat([grad_low, grad_B, grad_C], dim=2), height, width, routes)
    grad_x = cross_merge_torch(grad_u.unflatten(1, (4, -1)), height, width, routes).view(x.shape)
    return (
        grad_x.to(x.dtype),
        grad_projections.permute(0, 3, 1, 2).to(projections.dtype),
        torch.einsum("bkdl,bkrl->kdr", grad_delta, low).to(dt_weight.dtype),
        grad_bias.view(dt_bias.shape).to(dt_bias.dtype),
        grad_A.to(A.dtype),
        grad_D.to(D.dtype),
    )


def scan_arguments(x, projections, dt_weight, dt_bias, A, D, routes) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the low-rank step sizes (batch, 4, rank, length) and the arguments of the scan, in compute precision."""
    dtype = compute_dtype(x)
    rank, states = dt_weight.shape[2], A.shape[1]
    maps = projections.to(dtype).permute(0, 2, 3, 1).unflatten(3, x.shape[2:])  # (batch, 4, rank + 2 states, ...)
    maps = torch.stack([route.scan(each) for route, each in zip(ROUTES[routes], maps.unbind(1), strict=True)], dim=1)
    low, B, C = maps.split([rank, states, states], dim=2)
    u = cross_scan_torch(x.to(dtype), routes).flatten(1, 2)
    delta = torch.einsum("bkrl,kdr->bkdl", low, dt_weight.to(dtype)).flatten(1, 2)
    return low, (u, delta, A.to(dtype), B, C, D.to(dtype), dt_bias.to(dtype).flatten())


def _raster_order(sequences: Tensor, height: int, width: int, routes: str) -> Tensor:
    """Undo the order of each route: (batch, 4, channels, length) -> the same."""
    pairs = zip(ROUTES[routes], sequences.unbind(1), strict=True)
    return torch.stack([route.merge(each, height, width).flatten(2) for route, each in pairs], dim=1)
