"""`mamba_mixer`: argument checks, choice between the fused kernel and the composition, registration."""

import operator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.arguments import check, check_dims
from vision_kernels.backends import Implementation, Operator
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.mamba_mixer.composed import mamba_mixer_composed
from vision_kernels.mamba_mixer.cuda import mamba_mixer_cuda, why_unable
from vision_kernels.registration import define

_COMPOSED = "composed"
OPERATOR = Operator(
    "mamba_mixer",
    (
        compiled_for_cuda(mamba_mixer_cuda, None, why_unable),
        Implementation(_COMPOSED, mamba_mixer_composed, None, "conv1d_silu, two products and selective_scan"),
    ),
    composition=_COMPOSED,
)


def mamba_mixer(
    xz: Tensor,
    conv_weight: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """What MambaVision's mixer does between its outer projections (https://arxiv.org/abs/2407.08083, section 3.2).

    In terms of `conv1d_silu` and `selective_scan`, for sequences x and z side by side in `xz`::

        x, z     = conv1d_silu(xz, conv_weight)
        low, B, C = split(x_proj_weight x)                               (sizes rank, state, state)
        delta    = softplus(dt_proj_weight low + dt_bias + delta_bias)
        y        = selective_scan(x, delta, A, B, C, D)

    Without gradients, and where there is a kernel that does it all for these sizes, it is a single operator, computed
    in float32, with products of matrices in the precision of `xz`. Else it is the chain of those operators, which
    autograd, autocast and exporters see one by one.

    Args:
        xz: (batch, length, 2 inner).
        conv_weight: (2 inner, taps), for x and z.
        x_proj_weight: (rank + 2 state, inner).
        dt_proj_weight: (inner, rank).
        dt_bias: (inner,), added in the precision of the product.
        A: (inner, state) state matrix, diagonal; negative for a stable recurrence.
        D: (inner,) skip weight.
        delta_bias: (inner,), added in float32.

    Returns:
        (batch, length, 2 inner), y and z side by side, with the dtype of `xz`; contiguous.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; names the argument and both shapes.
    """
    arguments = (xz, conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D, delta_bias)
    _check_sizes(xz, conv_weight, dt_proj_weight, A)
    needs_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in arguments)
    if needs_gradient or not _has_fused(xz.device.type) or not _is_fused(*_case(*arguments)):
        _check(*arguments)
        return mamba_mixer_composed(*arguments)
    return torch.ops.vision_kernels.mamba_mixer(*arguments)


def _check_sizes(xz: Tensor, conv_weight: Tensor, dt_proj_weight: Tensor, A: Tensor) -> None:
    """Check the dimensions of the tensors that say which sizes the others must have."""
    check_dims("mamba_mixer", "xz", xz, "batch, length, 2 inner")
    check_dims("mamba_mixer", "conv_weight", conv_weight, "2 inner, taps")
    check_dims("mamba_mixer", "dt_proj_weight", dt_proj_weight, "inner, rank")
    check_dims("mamba_mixer", "A", A, "inner, state")


def _check(xz, conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D, delta_bias) -> None:
    _check_sizes(xz, conv_weight, dt_proj_weight, A)
    (batch, length, _), (inner, rank), state = xz.shape, dt_proj_weight.shape, A.shape[1]
    check(
        "mamba_mixer",
        {
            "dt_proj_weight": (dt_proj_weight, (inner, rank)),
            "xz": (xz, (batch, length, 2 * inner)),
            "conv_weight": (conv_weight, (2 * inner, max(1, conv_weight.shape[1]))),
            "x_proj_weight": (x_proj_weight, (rank + 2 * state, inner)),
            "dt_bias": (dt_bias, (inner,)),
            "A": (A, (inner, state)),
            "D": (D, (inner,)),
            "delta_bias": (delta_bias, (inner,)),
        },
    )


# The choice is made before the operator is called, and so also while a graph is traced, which then has one of the two.


@torch.compiler.assume_constant_result
def _has_fused(device_type: str) -> bool:
    return OPERATOR.select(device_type).backend != _COMPOSED


@torch.compiler.assume_constant_result
def _is_fused(device: torch.device, *case: torch.dtype | int) -> bool:
    return OPERATOR.select(device.type, device, *case).backend != _COMPOSED


def _case(xz, conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D, delta_bias) -> tuple:
    """Return what the choice depends on, the arguments of `why_unable`; in a graph these sizes become constants."""
    sizes = (xz.shape[1], *dt_proj_weight.shape, A.shape[1], conv_weight.shape[1])
    return xz.device, xz.dtype, *(operator.index(size) for size in sizes)


def _forward(
    xz: Tensor,
    conv_weight: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    arguments = (xz, conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D, delta_bias)
    return OPERATOR.select(xz.device.type, *_case(*arguments)).forward(*arguments)


def _fake_forward(xz, *parameters):
    return torch.empty_like(xz, memory_format=torch.contiguous_format)


def _refuse_gradient(ctx, grad):
    raise RuntimeError("torch.ops.vision_kernels.mamba_mixer has no gradient: call vision_kernels.mamba_mixer instead")


define(
    "mamba_mixer",
    _forward,
    _fake_forward,
    _refuse_gradient,
    None,
    check=_check,
    composition=mamba_mixer_composed,
)


@register_flop_formula(torch.ops.vision_kernels.mamba_mixer)
def _(xz_shape, conv_shape, x_proj_shape, dt_proj_shape, dt_bias_shape, A_shape, *args, **kwargs) -> int:
    """Those of its parts."""
    (batch, length, dim), (inner, rank) = xz_shape, dt_proj_shape
    products = x_proj_shape[0] + rank
    return batch * length * (2 * dim * conv_shape[1] + inner * (2 * products + 9 * A_shape[1] + 2))
