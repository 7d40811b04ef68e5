"""`conv1d_silu`: argument checks, choice of the implementation, registration."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.arguments import check, check_dims
from vision_kernels.backends import Implementation, Operator, compiled_for_cpu
from vision_kernels.conv1d_silu.cpu import conv1d_silu_cpu, conv1d_silu_cpu_backward
from vision_kernels.conv1d_silu.cuda import conv1d_silu_cuda, conv1d_silu_cuda_backward
from vision_kernels.conv1d_silu.reference import conv1d_silu_reference, conv1d_silu_reference_backward
from vision_kernels.conv1d_silu.torch_conv import conv1d_silu_torch, conv1d_silu_torch_backward
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.native import why_not_float32
from vision_kernels.registration import register
from vision_kernels.triton_support import compiled_by_triton

OPERATOR = Operator(
    "conv1d_silu",
    (
        compiled_for_cuda(conv1d_silu_cuda, conv1d_silu_cuda_backward, why_not_float32),
        *compiled_for_cpu(conv1d_silu_cpu, conv1d_silu_cpu_backward, why_not_float32),
        compiled_by_triton(
            "vision_kernels.conv1d_silu.triton_conv", "conv1d_silu_triton", "conv1d_silu_triton_backward"
        ),
        Implementation("torch", conv1d_silu_torch, conv1d_silu_torch_backward, "PyTorch's convolution"),
        Implementation(
            "reference", conv1d_silu_reference, conv1d_silu_reference_backward, "the definition, tap after tap"
        ),
    ),
)


def conv1d_silu(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution over time, the same length out as in, followed by SiLU.

    y_t = silu(sum_k weight_k x_{t + k - (taps - 1) // 2}), with zeros beyond both ends. It looks both ways, unlike the
    causal convolution of Mamba. Computed in float32, or in float64 if `x` is float64. Differentiable once.

    Args:
        x: (batch, length, dim).
        weight: (dim, taps).

    Returns:
        y: (batch, length, dim), contiguous, with the dtype of `x`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; names the argument and both shapes.
    """
    return torch.ops.vision_kernels.conv1d_silu(x, weight)


def _check(grad_y: Tensor | None, x: Tensor, weight: Tensor) -> None:
    check_dims("conv1d_silu", "x", x, "batch, length, dim")
    check_dims("conv1d_silu", "weight", weight, "dim, taps")
    shape_of_weight = (x.shape[2], max(1, weight.shape[1]))
    check("conv1d_silu", {"x": (x, x.shape), "weight": (weight, shape_of_weight), "grad_y": (grad_y, x.shape)})


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    return OPERATOR.select(x.device.type, x, weight).forward(x, weight).contiguous()


def _fake_forward(x, weight):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gradients(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = OPERATOR.select(x.device.type, x, weight).backward(grad_y, x, weight)
    return grad_x.contiguous(), grad_weight.contiguous()


def _fake_gradients(grad_y, x, weight):
    return tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in (x, weight))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y):
    return torch.ops.vision_kernels.conv1d_silu_backward(grad_y, *ctx.saved_tensors)


register(
    "conv1d_silu",
    _forward,
    _fake_forward,
    _gradients,
    _fake_gradients,
    _backward,
    _setup_context,
    check=_check,
    composition=conv1d_silu_reference,
)


@register_flop_formula(torch.ops.vision_kernels.conv1d_silu)
def _(x_shape, weight_shape, *args, **kwargs) -> int:
    """A multiplication and an addition for each tap, as other convolutions are counted."""
    return 2 * math.prod(x_shape) * weight_shape[1]


@register_flop_formula(torch.ops.vision_kernels.conv1d_silu_backward)
def _(grad_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    return 4 * math.prod(x_shape) * weight_shape[1]
