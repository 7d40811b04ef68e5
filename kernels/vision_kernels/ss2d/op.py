"""`ss2d`: argument checks, the projection of the input, choice of the implementation of the rest, registration."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.arguments import check, check_dims, check_output_dtype
from vision_kernels.backends import Implementation, Operator, compiled_for_cpu
from vision_kernels.cross_scan.routes import check_routes
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.registration import register
from vision_kernels.selective_scan.reference import selective_scan_reference, selective_scan_reference_backward
from vision_kernels.selective_scan.torch_scan import selective_scan_torch, selective_scan_torch_backward
from vision_kernels.ss2d.cpu import empty_image, memory_format_of, ss2d_cpu, ss2d_cpu_backward, why_unable
from vision_kernels.ss2d.cuda import ss2d_cuda, ss2d_cuda_backward
from vision_kernels.ss2d.cuda import why_unable as why_unable_on_cuda
from vision_kernels.ss2d.unfused import ss2d_unfused, ss2d_unfused_backward
from vision_kernels.triton_support import compiled_by_triton, why_not_of_16_or_32_bits

OPERATOR = Operator(
    "ss2d",
    (
        compiled_for_cuda(ss2d_cuda, ss2d_cuda_backward, why_unable_on_cuda),
        *compiled_for_cpu(ss2d_cpu, ss2d_cpu_backward, why_unable),
        compiled_by_triton(
            "vision_kernels.ss2d.triton_ss2d", "ss2d_triton", "ss2d_triton_backward", why_not_of_16_or_32_bits
        ),
        Implementation(
            "torch",
            functools.partial(ss2d_unfused, selective_scan_torch),
            functools.partial(ss2d_unfused_backward, selective_scan_torch_backward),
            "plain PyTorch around its selective scan",
        ),
        Implementation(
            "reference",
            functools.partial(ss2d_unfused, selective_scan_reference),
            functools.partial(ss2d_unfused_backward, selective_scan_reference_backward),
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

    The product with `x_proj_weight` is computed in the type of `x`, or of autocast; the rest in float32, or in float64
    if `x` is float64. Differentiable once in all tensors.

    Args:
        x: (batch, dim, height, width), with any strides.
        x_proj_weight: (4, rank + 2 state, dim).
        dt_projs_weight: (4, dim, rank).
        dt_projs_bias: (4, dim).
        A: (4 dim, state) state matrices, diagonal; negative for stable recurrences. Route after route, as D.
        D: (4 dim,) skip weights.
        routes: "cross", "unidirectional" or "bidirectional", see `cross_scan`.
        out_dtype: Of the output; that of `x` if None.

    Returns:
        y: (batch, dim, height, width), dense, channels last if the channels of `x` are adjacent in memory.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit (names the argument and both shapes), or there are no such
            routes.
    """
    _check_sizes(x, dt_projs_weight, A)
    columns = dt_projs_weight.shape[2] + 2 * A.shape[1]
    check("ss2d", {"x": (x, x.shape), "x_proj_weight": (x_proj_weight, (4, columns, x.shape[1]))})
    # A product at each position, and so the same before and after these are put in the order of a route.
    pixels = x.flatten(2).transpose(1, 2)  # (batch, length, dim)
    projections = F.linear(pixels, x_proj_weight.flatten(0, 1).to(x.dtype)).unflatten(2, x_proj_weight.shape[:2])
    out_dtype = x.dtype if out_dtype is None else out_dtype
    return torch.ops.vision_kernels.ss2d(x, projections, dt_projs_weight, dt_projs_bias, A, D, routes, out_dtype)


def _check_sizes(x: Tensor, dt_projs_weight: Tensor, A: Tensor) -> None:
    """Check the dimensions of the tensors that say which sizes the others must have."""
    check_dims("ss2d", "x", x, "batch, dim, height, width")
    check_dims("ss2d", "dt_projs_weight", dt_projs_weight, "4, dim, rank")
    check_dims("ss2d", "A", A, "4 dim, state")


def _check(
    grad_y: Tensor | None,
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: str,
    out_dtype: torch.dtype = torch.float32,
) -> None:
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


def _forward(
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: str,
    out_dtype: torch.dtype,
) -> Tensor:
    forward = OPERATOR.select(x.device.type, x, out_dtype).forward
    y = forward(x, projections, dt_weight, dt_bias, A, D, routes, out_dtype)
    return y.contiguous(memory_format=memory_format_of(x))


def _fake_forward(x, projections, dt_weight, dt_bias, A, D, routes, out_dtype):
    return empty_image(x, out_dtype)


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    backward = OPERATOR.select(x.device.type, x, grad_y.dtype).backward
    grad_x, *others = backward(grad_y, x, projections, dt_weight, dt_bias, A, D, routes)
    grad_x = grad_x.contiguous(memory_format=memory_format_of(x))
    return grad_x, *(each.contiguous() for each in others)


def _fake_gradients(grad_y, x, projections, dt_weight, dt_bias, A, D, routes):
    others = (projections, dt_weight, dt_bias, A, D)
    return empty_image(x, x.dtype), *(torch.empty_like(each, memory_format=torch.contiguous_format) for each in others)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.routes, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y):
    grads = torch.ops.vision_kernels.ss2d_backward(grad_y, *ctx.saved_tensors, ctx.routes)
    return *grads, None, None


register(
    "ss2d",
    _forward,
    _fake_forward,
    _gradients,
    _fake_gradients,
    _backward,
    _setup_context,
    check=_check,
    composition=functools.partial(ss2d_unfused, selective_scan_reference),
)


def _flops(x_shape, dt_weight_shape, A_shape) -> int:
    """Those of four selective scans, and of the products that give their step sizes."""
    batch, dim, height, width = x_shape
    return batch * 4 * dim * height * width * (9 * A_shape[1] + 2 + 2 * dt_weight_shape[2])


@register_flop_formula(torch.ops.vision_kernels.ss2d)
def _(x_shape, projections_shape, dt_weight_shape, dt_bias_shape, A_shape, *args, **kwargs) -> int:
    return _flops(x_shape, dt_weight_shape, A_shape)


@register_flop_formula(torch.ops.vision_kernels.ss2d_backward)
def _(grad_shape, x_shape, projections_shape, dt_weight_shape, dt_bias_shape, A_shape, *args, **kwargs) -> int:
    return 2 * _flops(x_shape, dt_weight_shape, A_shape)
