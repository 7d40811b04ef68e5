"""`conv1d_silu`: argument checks, backends, registration."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.arguments import check, check_dims
from vision_kernels.backends import Implementation, Operator
from vision_kernels.conv1d_silu import cpu, cuda, reference, torch_conv
from vision_kernels.conv1d_silu.arguments import ConvArguments
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.native import compiled_for_cpu, why_not_float32
from vision_kernels.registration import register
from vision_kernels.triton_support import compiled_by_triton

OPERATOR = Operator(
    "conv1d_silu",
    (
        compiled_for_cuda(cuda.forward, cuda.backward, why_not_float32),
        *compiled_for_cpu(cpu.forward, cpu.backward, why_not_float32),
        compiled_by_triton("vision_kernels.conv1d_silu.triton_conv"),
        Implementation("torch", torch_conv.forward, torch_conv.backward, "PyTorch's convolution"),
        Implementation("reference", reference.forward, reference.backward, "the definition, tap after tap"),
    ),
)


def conv1d_silu(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution over time that preserves the length, followed by SiLU.

    y_t = silu(sum_k weight_k x_{t + k - (taps - 1) // 2}), with zeros beyond both ends. It is bidirectional, unlike the
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


def _check(grad_y: Tensor | None, given: ConvArguments) -> None:
    x, weight = given
    check_dims("conv1d_silu", "x", x, "batch, length, dim")
    check_dims("conv1d_silu", "weight", weight, "dim, taps")
    shape_of_weight = (x.shape[2], max(1, weight.shape[1]))
    check("conv1d_silu", {"x": (x, x.shape), "weight": (weight, shape_of_weight), "grad_y": (grad_y, x.shape)})


register(OPERATOR, ConvArguments, _check, reference.forward)


@register_flop_formula(torch.ops.vision_kernels.conv1d_silu)
def _(x_shape, weight_shape, *args, **kwargs) -> int:
    """Count a multiplication and an addition for each tap, as for other convolutions."""
    return 2 * math.prod(x_shape) * weight_shape[1]


@register_flop_formula(torch.ops.vision_kernels.conv1d_silu_backward)
def _(grad_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    return 4 * math.prod(x_shape) * weight_shape[1]
