"""`cross_scan` and `cross_merge`: argument checks, choice of the implementation, registration.

Each is linear, and the gradient of the other, so that both can be differentiated any number of times.
"""

import torch
from torch import Tensor

from vision_kernels.arguments import check_dims, check_moved
from vision_kernels.backends import Implementation, Operator, compiled_for_cpu
from vision_kernels.cross_scan.cpu import cross_merge_cpu, cross_scan_cpu, why_unable
from vision_kernels.cross_scan.cuda import cross_merge_cuda, cross_scan_cuda
from vision_kernels.cross_scan.cuda import why_unable as why_unable_on_cuda
from vision_kernels.cross_scan.reference import cross_merge_reference, cross_scan_reference
from vision_kernels.cross_scan.routes import check_routes
from vision_kernels.cross_scan.torch_routes import cross_merge_torch, cross_scan_torch
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.registration import define
from vision_kernels.triton_support import compiled_by_triton, why_not_of_16_or_32_bits

_TRITON = "vision_kernels.cross_scan.triton_routes"

SCAN = Operator(
    "cross_scan",
    (
        compiled_for_cuda(cross_scan_cuda, None, why_unable_on_cuda),
        *compiled_for_cpu(cross_scan_cpu, None, why_unable),
        compiled_by_triton(_TRITON, "cross_scan_triton", None, why_not_of_16_or_32_bits),
        Implementation("torch", cross_scan_torch, None, "PyTorch's transposition and flip"),
        Implementation("reference", cross_scan_reference, None, "the definition, a table of positions"),
    ),
)
MERGE = Operator(
    "cross_merge",
    (
        compiled_for_cuda(cross_merge_cuda, None, why_unable_on_cuda),
        *compiled_for_cpu(cross_merge_cpu, None, why_unable),
        compiled_by_triton(_TRITON, "cross_merge_triton", None, why_not_of_16_or_32_bits),
        Implementation("torch", cross_merge_torch, None, "PyTorch's transposition and flip"),
        Implementation("reference", cross_merge_reference, None, "the definition, a table of positions"),
    ),
)


def cross_scan(x: Tensor, routes: str = "cross") -> Tensor:
    """Read images along four routes (VMamba, Liu et al. 2024, section 4.2, https://arxiv.org/abs/2401.10166).

    Its gradient is `cross_merge`.

    Args:
        x: (batch, dim, height, width), real, complex, integer or boolean.
        routes: "cross": row after row, column after column, and both backwards. "unidirectional": four times row after
            row. "bidirectional": twice row after row, and twice backwards.

    Returns:
        (batch, 4, dim, height * width), contiguous, with the dtype of `x`.

    Raises:
        ValueError: `x` has another number of dimensions, or there are no routes of this name.
    """
    return torch.ops.vision_kernels.cross_scan(x, routes)


def cross_merge(y: Tensor, height: int, width: int, routes: str = "cross") -> Tensor:
    """Put the sequences of four routes back to row-major order and add them up.

    Types of 16 bits are added up in float32. Its gradient is `cross_scan`.

    Args:
        y: (batch, 4, dim, height * width), real, complex, integer or boolean.
        height: Of the image.
        width: Of the image.
        routes: As for `cross_scan`.

    Returns:
        (batch, dim, height * width), contiguous, with the dtype of `y`.

    Raises:
        ValueError: `y` has another shape, or there are no routes of this name.
    """
    return torch.ops.vision_kernels.cross_merge(y, height, width, routes)


def _check_scan(x: Tensor, routes: str) -> None:
    check_routes("cross_scan", routes)
    check_dims("cross_scan", "x", x, "batch, dim, height, width")
    check_moved("cross_scan", "x", x)


def _check_merge(y: Tensor, height: int, width: int, routes: str) -> None:
    check_routes("cross_merge", routes)
    check_dims("cross_merge", "y", y, "batch, 4, dim, length")
    check_moved("cross_merge", "y", y)
    if (y.shape[1], y.shape[3]) != (4, height * width) or height < 0 or width < 0:
        expected = (y.shape[0], 4, y.shape[2], height * width)
        raise ValueError(
            f"cross_merge: y has shape {tuple(y.shape)}, expected {expected} "
            f"for an image of height {height} and width {width}"
        )


def _scan(x: Tensor, routes: str) -> Tensor:
    return SCAN.select(x.device.type, x).forward(x, routes).contiguous()


def _fake_scan(x, routes):
    batch, dim, height, width = x.shape
    return x.new_empty(batch, 4, dim, height * width)


def _keep_image_size(ctx, inputs, output):
    x, ctx.routes = inputs
    ctx.image_size = x.shape[2:]


def _merge_gradient(ctx, grad_y):
    grad_x = torch.ops.vision_kernels.cross_merge(grad_y, *ctx.image_size, ctx.routes)
    return grad_x.unflatten(2, ctx.image_size), None


def _merge(y: Tensor, height: int, width: int, routes: str) -> Tensor:
    return MERGE.select(y.device.type, y).forward(y, height, width, routes).contiguous()


def _fake_merge(y, height, width, routes):
    return y.new_empty(y.shape[0], *y.shape[2:])


def _keep_arguments(ctx, inputs, output):
    _, *ctx.image_size, ctx.routes = inputs


def _scan_gradient(ctx, grad_x):
    return torch.ops.vision_kernels.cross_scan(grad_x.unflatten(2, ctx.image_size), ctx.routes), None, None, None


define(
    "cross_scan",
    _scan,
    _fake_scan,
    _merge_gradient,
    _keep_image_size,
    check=_check_scan,
    composition=cross_scan_torch,
)
define(
    "cross_merge",
    _merge,
    _fake_merge,
    _scan_gradient,
    _keep_arguments,
    check=_check_merge,
    composition=cross_merge_torch,
)
