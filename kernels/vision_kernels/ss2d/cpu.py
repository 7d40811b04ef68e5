"""SS2D by the compiled CPU kernels (csrc/cpu/ss2d.cpp and ss2d_backward.cpp)."""

import torch
from torch import Tensor

from vision_kernels.cross_scan import ROUTES
from vision_kernels.native import Library
from vision_kernels.ss2d.arguments import Ss2dArguments, empty_image
from vision_kernels.views import as_parameter

# The backward pass is divided into at most this many parts. Each accumulates its own gradients, which are then summed
# in order: the result depends on the shape, but not on the number of threads.
_PARTS = 64
_REGISTER_BLOCK = 16  # kBlock in csrc/cpu/ss2d.h


def forward(library: Library, given: Ss2dArguments) -> Tensor:
    """Return y."""
    y = empty_image(given.x, given.out_dtype)
    library.call("ss2d_forward", *_readable(given), y.flatten(2))
    return y


def _readable(given: Ss2dArguments) -> list[Tensor | int | None]:
    x, *others = given[:6]
    steps = (route.step(x.shape[3]) for route in ROUTES[given.routes])
    return [x.flatten(2), *map(as_parameter, others), *steps]


def backward(library: Library, grad_y: Tensor, given: Ss2dArguments) -> tuple[Tensor, ...]:
    """Return the gradients of the six tensors."""
    x, projections, (batch, dim) = given.x, given.projections, given.x.shape[:2]
    rank, states = given.dt_weight.shape[2], given.A.shape[1]
    blocks = -(-dim // _REGISTER_BLOCK)
    batch_parts = min(batch, _PARTS)
    block_parts = max(1, min(blocks, _PARTS // batch_parts))
    rows = 4 * (rank + 1 + states) + 1
    grad_x = empty_image(x, x.dtype)
    # These gradients sum over channels and over positions. Each part of the work has its own sum.
    of_projections = projections.new_zeros(block_parts, *projections.shape, dtype=torch.float32)
    of_parameters = projections.new_zeros(batch_parts, blocks, rows, _REGISTER_BLOCK, dtype=torch.float32)
    grads = grad_x.flatten(2), of_projections, of_parameters
    library.call("ss2d_backward", grad_y.flatten(2), *_readable(given), *grads)

    grad_parameters = _sum(library, of_parameters).transpose(0, 1).flatten(1)[:, :dim]  # (rows, dim)
    by_route = grad_parameters[:-1].unflatten(0, (4, -1))  # (4, rank + 1 + states, dim)
    grad_weight, grad_bias, grad_A = by_route.split([rank, 1, states], dim=1)
    return (
        grad_x,
        _sum(library, of_projections),
        grad_weight.transpose(1, 2),
        grad_bias.squeeze(1),
        grad_A.transpose(1, 2).flatten(0, 1),
        grad_parameters[-1].repeat(4),
    )


def _sum(library: Library, parts: Tensor) -> Tensor:
    """Return the sum over the first dimension; the last bits of torch's would depend on the number of threads."""
    if parts.shape[0] == 1:
        return parts[0]
    total = torch.empty_like(parts[0])
    library.call("ss2d_add_up", parts.flatten(1), total.flatten())
    return total
