"""`mamba_mixer`: argument checks, choice between the fused kernel and the composition, registration."""

import operator
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.arguments import check, check_dims, check_states
from vision_kernels.backends import Implementation, Operator
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.mamba_mixer import cuda
from vision_kernels.mamba_mixer.arguments import MixerArguments
from vision_kernels.mamba_mixer.composed import mamba_mixer_composed
from vision_kernels.registration import define
from vision_kernels.views import contiguous_like


def _compose(given: MixerArguments) -> Tensor:
    return mamba_mixer_composed(*given)


_COMPOSED = "composed"
OPERATOR = Operator(
    "mamba_mixer",
    (
        compiled_for_cuda(cuda.forward, None, cuda.why_unable),
        Implementation(_COMPOSED, _compose, None, "conv1d_silu, two products and selective_scan"),
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
    """MambaVision's mixer between its outer projections (https://arxiv.org/abs/2407.08083, section 3.2).

    In terms of `conv1d_silu` and `selective_scan`, for sequences x and z side by side in `xz`::

        x, z     = conv1d_silu(xz, conv_weight)
        low, B, C = split(x_proj_weight x)                               (sizes rank, state, state)
        delta    = softplus(dt_proj_weight low + dt_bias + delta_bias)
        y        = selective_scan(x, delta, A, B, C, D)

    If no gradients are needed and a fused kernel supports these sizes, it is a single operator, computed in float32
    with matrix products in the precision of `xz`. Otherwise it is the chain of those operators, which autograd,
    autocast and exporters see one by one.

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
    given = MixerArguments(xz, conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D, delta_bias)
    _check_sizes(given)
    needs_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in given)
    if needs_gradient or not _has_fused(xz.device.type) or not _is_fused(*_case(given)):
        _check(given)
        return mamba_mixer_composed(*given)
    return torch.ops.vision_kernels.mamba_mixer(*given)


def _check_sizes(given: MixerArguments) -> None:
    """Check the dimensions of the tensors that determine the sizes of the others."""
    check_dims("mamba_mixer", "xz", given.xz, "batch, length, 2 inner")
    check_dims("mamba_mixer", "conv_weight", given.conv_weight, "2 inner, taps")
    check_dims("mamba_mixer", "dt_proj_weight", given.dt_proj_weight, "inner, rank")
    check_dims("mamba_mixer", "A", given.A, "inner, state")
    check_states("mamba_mixer", given.A)


def _check(given: MixerArguments) -> None:
    _check_sizes(given)
    (batch, length, _), (inner, rank), state = given.xz.shape, given.dt_proj_weight.shape, given.A.shape[1]
    check(
        "mamba_mixer",
        {
            "dt_proj_weight": (given.dt_proj_weight, (inner, rank)),
            "xz": (given.xz, (batch, length, 2 * inner)),
            "conv_weight": (given.conv_weight, (2 * inner, max(1, given.conv_weight.shape[1]))),
            "x_proj_weight": (given.x_proj_weight, (rank + 2 * state, inner)),
            "dt_bias": (given.dt_bias, (inner,)),
            "A": (given.A, (inner, state)),
            "D": (given.D, (inner,)),
            "delta_bias": (given.delta_bias, (inner,)),
        },
    )


# The choice precedes the call of the operator, so it is also made while tracing: a graph contains one of the two.


@torch.compiler.assume_constant_result
def _has_fused(device_type: str) -> bool:
    return OPERATOR.select(device_type).backend != _COMPOSED


@torch.compiler.assume_constant_result
def _is_fused(device: torch.device, *case: torch.dtype | int) -> bool:
    return OPERATOR.select(device.type, device, *case).backend != _COMPOSED


def _case(given: MixerArguments) -> tuple:
    """Return the arguments of `why_unable`, on which the choice depends; in a graph these sizes become constants."""
    sizes = (given.xz.shape[1], *given.dt_proj_weight.shape, given.A.shape[1], given.conv_weight.shape[1])
    return given.xz.device, given.xz.dtype, *(operator.index(size) for size in sizes)


def _prepare(*arguments: Tensor) -> tuple[MixerArguments]:
    given = MixerArguments(*arguments)
    _check(given)
    return (given,)


def _compute(given: MixerArguments) -> Tensor:
    return OPERATOR.select(given.xz.device.type, *_case(given)).forward(given)


def _allocate(given: MixerArguments) -> Tensor:
    return contiguous_like(given.xz)


def _refuse_gradient(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("torch.ops.vision_kernels.mamba_mixer has no gradient: call vision_kernels.mamba_mixer instead")


define("mamba_mixer", get_type_hints(MixerArguments), _prepare, _compute, _allocate, _compose, _refuse_gradient)


@register_flop_formula(torch.ops.vision_kernels.mamba_mixer)
def _(xz_shape, conv_shape, x_proj_shape, dt_proj_shape, dt_bias_shape, A_shape, *args, **kwargs) -> int:
    """Count the operations of its parts."""
    (batch, length, dim), (inner, rank) = xz_shape, dt_proj_shape
    products = x_proj_shape[0] + rank
    return batch * length * (2 * dim * conv_shape[1] + inner * (2 * products + 9 * A_shape[1] + 2))
