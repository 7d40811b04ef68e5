"""SS2D by the compiled CPU kernels (csrc/cpu/ss2d.cpp and ss2d_backward.cpp)."""

import torch
from torch import Tensor

from vision_kernels import native
from vision_kernels.cross_scan import ROUTES

_DTYPES = (torch.float32, torch.bfloat16)
# Into so many parts the work of the backward pass is divided, at most. Each part adds up gradients of its own, which
# are then added in order: the result depends on the shape, but not on the number of threads.
_PARTS = 64
_REGISTER_BLOCK = 16  # kBlock in csrc/cpu/ss2d.h


def why_unable(x: Tensor, out_dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot compute this, or None if they can."""
    unable = [dtype for dtype in (x.dtype, out_dtype) if dtype not in _DTYPES]
    return f"computes float32 and bfloat16, not {unable[0]}" if unable else None


def ss2d_cpu(instruction_set: str, x, projections, dt_weight, dt_bias, A, D, routes, out_dtype) -> Tensor:
    """Return y. Shapes as in `vision_kernels.ss2d.unfused`."""
    y = empty_image(x, out_dtype)
    native.call(
        "ss2d_forward", instruction_set, *_arguments(x, projections, dt_weight, dt_bias, A, D, routes), y.flatten(2)
    )
    return y


def _arguments(x, projections, dt_weight, dt_bias, A, D, routes) -> list[Tensor | int]:
    others = [each.detach().float().contiguous() for each in (projections, dt_weight, dt_bias, A, D)]
    return [x.flatten(2), *others, *(route.step(x.shape[3]) for route in ROUTES[routes])]


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the format of images that belong to `x`: channels last if its channels are adjacent, as in a slice."""
    return torch.channels_last if x.stride(1) == 1 and not x.is_contiguous() else torch.contiguous_format


def empty_image(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for an image of the shape and in the memory format of `x`."""
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format_of(x))


def ss2d_cpu_backward(
    instruction_set: str, grad_y, x, projections, dt_weight, dt_bias, A, D, routes
) -> tuple[Tensor, ...]:
    """Return the gradients of the six tensors from x to D."""
    batch, dim = x.shape[:2]
    rank, states = dt_weight.shape[2], A.shape[1]
    blocks = -(-dim // _REGISTER_BLOCK)
    batch_parts = max(1, min(batch, _PARTS))
    block_parts = max(1, min(blocks, _PARTS // batch_parts))
    rows = 4 * (rank + 1 + states) + 1
    grad_x = empty_image(x, x.dtype)
    # These gradients sum over channels and over positions. Each part of the work has its own sum.
    of_projections = projections.new_zeros(block_parts, *projections.shape, dtype=torch.float32)
    of_parameters = projections.new_zeros(batch_parts, blocks, rows, _REGISTER_BLOCK, dtype=torch.float32)
    arguments = _arguments(x, projections, dt_weight, dt_bias, A, D, routes)
    of_these = grad_x.flatten(2), of_projections, of_parameters
    native.call("ss2d_backward", instruction_set, grad_y.flatten(2), *arguments, *of_these)

    grad_projections = _added_up(instruction_set, of_projections)
    grad_parameters = _added_up(instruction_set, of_parameters).transpose(0, 1).flatten(1)[:, :dim]  # (rows, dim)
    by_route = grad_parameters[:-1].unflatten(0, (4, -1))  # (4, rank + 1 + states, dim)
    grad_weight, grad_bias, grad_A = by_route.split([rank, 1, states], dim=1)
    return (
        grad_x,
        grad_projections.to(projections.dtype),
        grad_weight.transpose(1, 2).to(dt_weight.dtype),
        grad_bias.squeeze(1).to(dt_bias.dtype),
        grad_A.transpose(1, 2).flatten(0, 1).to(A.dtype),
        grad_parameters[-1].repeat(4).to(D.dtype),
    )


def _added_up(instruction_set: str, parts: Tensor) -> Tensor:
    """Return the sum over the first dimension; torch's would depend on the number of threads in the last bits."""
    if parts.shape[0] == 1:
        return parts[0]
    total = torch.empty_like(parts[0])
    native.call("ss2d_add_up", instruction_set, parts.flatten(1), total.flatten())
    return total
