"""`cross_scan` and `cross_merge`: argument checks, backends, registration.

Each is linear and the gradient of the other, so both can be differentiated any number of times.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vision_kernels.arguments import CPU_DTYPES, GPU_DTYPES, check_dims, check_moved
from vision_kernels.backends import Implementation, Operator
from vision_kernels.cross_scan import compiled, reference, torch_routes
from vision_kernels.cross_scan.routes import check_routes
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.native import compiled_for_cpu
from vision_kernels.registration import define
from vision_kernels.triton_support import compiled_by_triton


def _operator(name: str, kernel: Callable, triton: str, in_torch: Callable, definition: Callable) -> Operator:
    on_cpu, on_gpu = (functools.partial(compiled.why_unable, dtypes) for dtypes in (CPU_DTYPES, GPU_DTYPES))
    return Operator(
        name,
        (
            compiled_for_cuda(kernel, None, on_gpu),
            *compiled_for_cpu(kernel, None, on_cpu),
            compiled_by_triton("vision_kernels.cross_scan.triton_routes", triton, None, on_gpu),
            Implementation("torch", in_torch, None, "PyTorch's transpositions and flips"),
            Implementation("reference", definition, None, "the definition, a table of positions"),
        ),
    )


SCAN = _operator("cross_scan", compiled.scan, "scan", torch_routes.scan, reference.scan)
MERGE = _operator("cross_merge", compiled.merge, "merge", torch_routes.merge, reference.merge)


def cross_scan(x: Tensor, routes: str = "cross") -> Tensor:
    """Read images along four routes (VMamba, Liu et al. 2024, section 4.2, https://arxiv.org/abs/2401.10166).

    Its gradient is `cross_merge`.

    Args:
        x: (batch, dim, height, width), real, complex, integer or boolean.
        routes: "cross": by rows, by columns, and both backwards. "unidirectional": by rows, four times.
            "bidirectional": by rows, twice forwards and twice backwards.

    Returns:
        (batch, 4, dim, height * width), contiguous, with the dtype of `x`.

    Raises:
        ValueError: `x` does not have four dimensions, or `routes` is unknown.
    """
    return torch.ops.vision_kernels.cross_scan(x, routes)


def cross_merge(y: Tensor, height: int, width: int, routes: str = "cross") -> Tensor:
    """Reorder the sequences of four routes to row-major order and sum them.

    16-bit dtypes are summed in float32. Its gradient is `cross_scan`.

    Args:
        y: (batch, 4, dim, height * width), real, complex, integer or boolean.
        height: Height of the image.
        width: Width of the image.
        routes: As for `cross_scan`.

    Returns:
        (batch, dim, height * width), contiguous, with the dtype of `y`.

    Raises:
        ValueError: `y` has another shape, or `routes` is unknown.
    """
    return torch.ops.vision_kernels.cross_merge(y, height, width, routes)


def _prepare_scan(x: Tensor, routes: str) -> tuple[Tensor, str]:
    check_routes("cross_scan", routes)
    check_dims("cross_scan", "x", x, "batch, dim, height, width")
    check_moved("cross_scan", "x", x)
    return x, routes


def _prepare_merge(y: Tensor, height: int, width: int, routes: str) -> tuple[Tensor, int, int, str]:
    check_routes("cross_merge", routes)
    check_dims("cross_merge", "y", y, "batch, 4, dim, length")
    check_moved("cross_merge", "y", y)
    if (y.shape[1], y.shape[3]) != (4, height * width) or height < 0 or width < 0:
        expected = (y.shape[0], 4, y.shape[2], height * width)
        raise ValueError(
            f"cross_merge: y has shape {tuple(y.shape)}, expected {expected} "
            f"for an image of height {height} and width {width}"
        )
    return y, height, width, routes


def _scan(x: Tensor, routes: str) -> Tensor:
    return SCAN.select(x.device.type, x).forward(x, routes).contiguous()


def _allocate_scan(x: Tensor, routes: str) -> Tensor:
    batch, dim, height, width = x.shape
    return x.new_empty(batch, 4, dim, height * width)


def _keep_image_size(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.routes = inputs
    ctx.image_size = x.shape[2:]


def _merge_gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
    grad_x = torch.ops.vision_kernels.cross_merge(grad_y, *ctx.image_size, ctx.routes)
    return grad_x.unflatten(2, ctx.image_size), None


def _merge(y: Tensor, height: int, width: int, routes: str) -> Tensor:
    return MERGE.select(y.device.type, y).forward(y, height, width, routes).contiguous()


def _allocate_merge(y: Tensor, height: int, width: int, routes: str) -> Tensor:
    return y.new_empty(y.shape[0], *y.shape[2:])


def _keep_arguments(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, *ctx.image_size, ctx.routes = inputs


def _scan_gradient(ctx: Any, grad_x: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.vision_kernels.cross_scan(grad_x.unflatten(2, ctx.image_size), ctx.routes), None, None, None


define(
    "cross_scan",
    {"x": Tensor, "routes": str},
    _prepare_scan,
    _scan,
    _allocate_scan,
    torch_routes.scan,
    _merge_gradient,
    _keep_image_size,
)
define(
    "cross_merge",
    {"y": Tensor, "height": int, "width": int, "routes": str},
    _prepare_merge,
    _merge,
    _allocate_merge,
    torch_routes.merge,
    _scan_gradient,
    _keep_arguments,
)
