"""`selective_scan`: argument checks, and registration with torch.library.

Registered as operators, the scan and its gradient are single nodes for autograd, `torch.compile(fullgraph=True)`,
`torch.export` and fake tensors; which implementation runs is decided when they run (see `vision_kernels.backends`).
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.backends import Implementation, Operator
from vision_kernels.selective_scan.reference import selective_scan_reference, selective_scan_reference_backward
from vision_kernels.selective_scan.torch_scan import selective_scan_torch, selective_scan_torch_backward

OPERATOR = Operator(
    "selective_scan",
    (
        Implementation(
            "torch", selective_scan_torch, selective_scan_torch_backward, "plain PyTorch, time-major in place"
        ),
        Implementation(
            "reference", selective_scan_reference, selective_scan_reference_backward, "the definition, step by step"
        ),
    ),
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Selective scan of Mamba (Gu and Dao 2023, algorithm 2, https://arxiv.org/abs/2312.00752).

    For each batch entry and channel d, with the state s of size N starting from 0::

        delta_t = softplus(delta_t + delta_bias)                         (bias and softplus optional)
        s_t     = exp(delta_t A_d) s_{t-1} + delta_t B_t u_t
        y_t     = <C_t, s_t> + D_d u_t                                   (D optional)

    Computed in float32, or in float64 if `u` is float64, whatever the other dtypes are. Differentiable once in all
    tensors.

    Args:
        u: (batch, dim, length) input.
        delta: (batch, dim, length) step size.
        A: (dim, state) state matrix, diagonal; negative for a stable recurrence.
        B: (batch, state, length), or (batch, groups, state, length) where channels d share B by consecutive groups of
            dim / groups.
        C: as B.
        D: (dim,) skip weight.
        delta_bias: (dim,) added to `delta` before the softplus.
        delta_softplus: Apply softplus to `delta`.

    Returns:
        y: (batch, dim, length), contiguous, with the dtype of `u`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; names the argument and both shapes.
    """
    B, C = _with_groups("B", B), _with_groups("C", C)
    _check(u, delta, A, B, C, D, delta_bias)
    return torch.ops.vision_kernels.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)


def _with_groups(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim not in (3, 4):
        raise ValueError(
            f"selective_scan: {name} must be (batch, state, length) or (batch, groups, state, length), "
            f"got shape {tuple(tensor.shape)}"
        )
    return tensor.unsqueeze(1) if tensor.ndim == 3 else tensor


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    if u.ndim != 3:
        raise ValueError(f"selective_scan: u must be (batch, dim, length), got shape {tuple(u.shape)}")
    if A.ndim != 2:
        raise ValueError(f"selective_scan: A must be (dim, state), got shape {tuple(A.shape)}")
    batch, dim, length = u.shape
    groups, state = B.shape[1], A.shape[1]
    if groups == 0 or dim % groups != 0:
        raise ValueError(
            f"selective_scan: dim {dim} of u does not divide into the {groups} groups of B {tuple(B.shape)}"
        )
    expected = {
        "delta": (delta, (batch, dim, length)),
        "A": (A, (dim, state)),
        "B": (B, (batch, groups, state, length)),
        "C": (C, (batch, groups, state, length)),
        "D": (D, (dim,)),
        "delta_bias": (delta_bias, (dim,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"selective_scan: {name} has shape {tuple(tensor.shape)}, expected {shape} "
                f"to go with u {tuple(u.shape)} and A {tuple(A.shape)}"
            )
        if tensor.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {tensor.device}, u is on {u.device}")
    for name, tensor in {"u": u, **{name: tensor for name, (tensor, _) in expected.items()}}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"selective_scan: {name} must be a real floating-point tensor, got {tensor.dtype}")


@torch.library.custom_op("vision_kernels::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    forward = OPERATOR.select(u.device.type).forward
    return forward(u, delta, A, B, C, D, delta_bias, delta_softplus)


@_selective_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


# An operator cannot return "no tensor": the gradient of an absent D or delta_bias is an empty tensor.
@torch.library.custom_op("vision_kernels::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    backward = OPERATOR.select(u.device.type).backward
    grads = backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus)
    return tuple(u.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


@_selective_scan_backward.register_fake
def _(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus):
    return tuple(
        u.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (u, delta, A, B, C, D, delta_bias)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y):
    tensors = ctx.saved_tensors
    grads = torch.ops.vision_kernels.selective_scan_backward(grad_y, *tensors, ctx.delta_softplus)
    return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True)), None


_selective_scan.register_autograd(_backward, setup_context=_setup_context)


def _scan_flops(u_shape, A_shape, *, with_skip: bool) -> int:
    """9 operations for each (batch, dim, length, state): the count of the Mamba authors for the sequential form."""
    batch, dim, length = u_shape
    return batch * dim * length * (9 * A_shape[1] + (2 if with_skip else 0))


@register_flop_formula(torch.ops.vision_kernels.selective_scan)
def _(u_shape, delta_shape, A_shape, B_shape, C_shape, D_shape, *args, **kwargs) -> int:
    return _scan_flops(u_shape, A_shape, with_skip=D_shape is not None)


@register_flop_formula(torch.ops.vision_kernels.selective_scan_backward)
def _(grad_shape, u_shape, delta_shape, A_shape, B_shape, C_shape, D_shape, *args, **kwargs) -> int:
    return 2 * _scan_flops(u_shape, A_shape, with_skip=D_shape is not None)
