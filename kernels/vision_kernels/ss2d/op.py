"""`ss2d`: argument checks, the projection of the input, backends of the rest, registration."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.arguments import CPU_DTYPES, GPU_DTYPES, check, check_dims, check_output_dtype, check_states
from vision_kernels.backends import Implementation, Operator
from vision_kernels.cross_scan.routes import check_routes
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.native import compiled_for_cpu
from vision_kernels.registration import register
from vision_kernels.selective_scan import reference as scan_reference
from vision_kernels.selective_scan import torch_scan
from vision_kernels.ss2d import cpu, cuda, unfused
from vision_kernels.ss2d.arguments import Ss2dArguments, memory_format_of, why_unable
from vision_kernels.triton_support import compiled_by_triton

_definition = functools.partial(unfused.forward, scan_reference.forward)
OPERATOR = Operator(
    "ss2d",
    (
        compiled_for_cuda(cuda.forward, cuda.backward, cuda.why_unable),
        *compiled_for_cpu(cpu.forward, cpu.backward, functools.partial(why_unable, CPU_DTYPES)),
        compiled_by_triton("vision_kernels.ss2d.triton_ss2d", why_unable=functools.partial(why_unable, GPU_DTYPES)),
        Implementation(
            "torch",
            functools.partial(unfused.forward, torch_scan.forward),
            functools.partial(unfused.backward, torch_scan.backward),
            "plain PyTorch around its selective scan",
        ),
        Implementation(
            "reference",
            _definition,
            functools.partial(unfused.backward, scan_reference.backward),
            "the definition, step by step",
        ),
    ),
)


def ss2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: str = "cross",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Selective scans of images along four routes, merged: the core of VMamba's SS2D and of SegMAN's VSSM.

    (Liu et al. 2024, section 4.3, https://arxiv.org/abs/2401.10166.) In terms of `cross_scan`, `selective_scan` and
    `cross_merge`, for each route j and with sequences u_j of x::

        low_j, B_j, C_j = split(x_proj_weight_j u_j)                    (sizes rank, state, state)
        delta_j         = softplus(dt_projs_weight_j low_j + dt_projs_bias_j)
        y               = cross_merge(selective_scan(u_j, delta_j, A_j, B_j, C_j, D_j))

    The product with `x_proj_weight` is computed in the dtype of `x`, or of autocast; the rest in float32, or in float64
    if `x` is float64. Differentiable once in all tensors.

    Args:
        x: (batch, dim, height, width), with any strides.
        x_proj_weight: (4, rank + 2 state, dim).
        dt_projs_weight: (4, dim, rank).
        dt_projs_bias: (4, dim).
        A: (4 dim, state) state matrices of the routes in turn, diagonal; negative for stable recurrences.
        D: (4 dim,) skip weights.
        routes: "cross", "unidirectional" or "bidirectional", see `cross_scan`.
        out_dtype: Dtype of the output, by default that of `x`.

    Returns:
        y: (batch, dim, height, width), dense, channels last if the channels of `x` are adjacent in memory.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit (names the argument and both shapes), or `routes` is unknown.
    """
    _check_sizes(x, dt_projs_weight, A)
    columns = dt_projs_weight.shape[2] + 2 * A.shape[1]
    check("ss2d", {"x": (x, x.shape), "x_proj_weight": (x_proj_weight, (4, columns, x.shape[1]))})
    # A product at each position, so it may be computed before the positions are reordered along a route.
    pixels = x.flatten(2).transpose(1, 2)  # (batch, length, dim)
    projections = F.linear(pixels, x_proj_weight.flatten(0, 1).to(x.dtype)).unflatten(2, x_proj_weight.shape[:2])
    out_dtype = x.dtype if out_dtype is None else out_dtype
    return torch.ops.vision_kernels.ss2d(x, projections, dt_projs_weight, dt_projs_bias, A, D, routes, out_dtype)


def _check_sizes(x: Tensor, dt_projs_weight: Tensor, A: Tensor) -> None:
    """Check the dimensions of the tensors that determine the sizes of the others."""
    check_dims("ss2d", "x", x, "batch, dim, height, width")
    check_dims("ss2d", "dt_projs_weight", dt_projs_weight, "4, dim, rank")
    check_dims("ss2d", "A", A, "4 dim, state")
    check_states("ss2d", A)


def _check(grad_y: Tensor | None, given: Ss2dArguments) -> None:
    x, projections, dt_weight, dt_bias, A, D, routes, out_dtype = given
    check_routes("ss2d", routes)
    _check_sizes(x, dt_weight, A)
    (batch, dim, height, width), rank, state = x.shape, dt_weight.shape[2], A.shape[1]
    check(
        "ss2d",
        {
            "x": (x, x.shape),
            "projections": (projections, (batch, height * width, 4, rank + 2 * state)),
            "dt_projs_weight": (dt_weight, (4, dim, rank)),
            "dt_projs_bias": (dt_bias, (4, dim)),
            "A": (A, (4 * dim, state)),
            "D": (D, (4 * dim,)),
            "grad_y": (grad_y, x.shape),
        },
    )
    check_output_dtype("ss2d", out_dtype)


register(OPERATOR, Ss2dArguments, _check, _definition, memory_format=memory_format_of)


def _flops(x_shape, dt_weight_shape, A_shape) -> int:
    """Count four selective scans and the products that yield their step sizes."""
    batch, dim, height, width = x_shape
    return batch * 4 * dim * height * width * (9 * A_shape[1] + 2 + 2 * dt_weight_shape[2])


@register_flop_formula(torch.ops.vision_kernels.ss2d)
def _(x_shape, projections_shape, dt_weight_shape, dt_bias_shape, A_shape, *args, **kwargs) -> int:
    return _flops(x_shape, dt_weight_shape, A_shape)


@register_flop_formula(torch.ops.vision_kernels.ss2d_backward)
def _(grad_shape, x_shape, projections_shape, dt_weight_shape, dt_bias_shape, A_shape, *args, **kwargs) -> int:
    return 2 * _flops(x_shape, dt_weight_shape, A_shape)
