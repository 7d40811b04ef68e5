"""`selective_scan`: argument checks, choice of the implementation, registration."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.arguments import check, check_dims, check_output_dtype
from vision_kernels.backends import Implementation, Operator, compiled_for_cpu
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.native import why_not_float32
from vision_kernels.registration import register
from vision_kernels.selective_scan.cpu import selective_scan_cpu, selective_scan_cpu_backward
from vision_kernels.selective_scan.cuda import (
    selective_scan_cuda,
    selective_scan_cuda_backward,
    why_unable,
)
from vision_kernels.selective_scan.reference import selective_scan_reference, selective_scan_reference_backward
from vision_kernels.selective_scan.torch_scan import selective_scan_torch, selective_scan_torch_backward
from vision_kernels.triton_support import compiled_by_triton


def channels_first(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function on (batch, dim, length) serve both layouts."""

    def either(u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last, out_dtype):
        if channels_last:
            u, delta, B, C = (each.movedim(1, -1) for each in (u, delta, B, C))
        y = forward(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype)
        return y.movedim(-1, 1) if channels_last else y

    return either


def channels_first_backward(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """The same for the gradients."""

    def either(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last):
        if not channels_last:
            return backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus)
        grad_y, u, delta, B, C = (each.movedim(1, -1) for each in (grad_y, u, delta, B, C))
        of_u, of_delta, of_A, of_B, of_C, *others = backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus)
        of_u, of_delta, of_B, of_C = (each.movedim(-1, 1) for each in (of_u, of_delta, of_B, of_C))
        return of_u, of_delta, of_A, of_B, of_C, *others

    return either


OPERATOR = Operator(
    "selective_scan",
    (
        compiled_for_cuda(selective_scan_cuda, selective_scan_cuda_backward, why_unable),
        *compiled_for_cpu(selective_scan_cpu, selective_scan_cpu_backward, why_not_float32),
        compiled_by_triton(
            "vision_kernels.selective_scan.triton_scan", "selective_scan_triton", "selective_scan_triton_backward"
        ),
        Implementation(
            "torch",
            channels_first(selective_scan_torch),
            channels_first_backward(selective_scan_torch_backward),
            "plain PyTorch, time-major in place",
        ),
        Implementation(
            "reference",
            channels_first(selective_scan_reference),
            channels_first_backward(selective_scan_reference_backward),
            "the definition, step by step",
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
    *,
    channels_last: bool = False,
    out_dtype: torch.dtype | None = None,
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
        delta: (batch, dim, length) step size, or (batch, deltas, length) where channels share it by consecutive
            groups of dim / deltas.
        A: (dim, state) state matrix, diagonal; negative for a stable recurrence.
        B: (batch, state, length), or (batch, groups, state, length) where channels d share B by consecutive groups of
            dim / groups.
        C: as B.
        D: (dim,) skip weight.
        delta_bias: (dim,), or (deltas,), added to `delta` before the softplus.
        delta_softplus: Apply softplus to `delta`.
        channels_last: u, delta and y are (batch, length, dim), B and C (batch, length, [groups,] state) instead. The
            faster layout on the CPU. Either is read as it is, whatever its strides.
        out_dtype: dtype of y, by default that of `u`.

    Returns:
        y: (batch, dim, length), or (batch, length, dim) if `channels_last`; contiguous.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; names the argument and both shapes.
    """
    channel_dim = 2 if channels_last else 1
    B, C = (each.unsqueeze(channel_dim) if each.ndim == 3 else each for each in (B, C))
    if delta.ndim == u.ndim == 3 and delta.shape[channel_dim] != u.shape[channel_dim]:
        delta, delta_bias = _repeated(u, delta, delta_bias, channel_dim)
    return torch.ops.vision_kernels.selective_scan(
        u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last, out_dtype or u.dtype
    )


def _repeated(u: Tensor, delta: Tensor, delta_bias: Tensor | None, channel_dim: int) -> tuple[Tensor, Tensor | None]:
    """Return a step size for every channel of u."""
    deltas, dim = delta.shape[channel_dim], u.shape[channel_dim]
    _check_groups(u, "delta", delta, channel_dim)
    shape = [*u.shape]
    shape[channel_dim] = deltas
    check("selective_scan", {"u": (u, u.shape), "delta": (delta, tuple(shape)), "delta_bias": (delta_bias, (deltas,))})
    delta = delta.repeat_interleave(dim // deltas, dim=channel_dim)
    return delta, None if delta_bias is None else delta_bias.repeat_interleave(dim // deltas)


def _check_groups(u: Tensor, name: str, tensor: Tensor, channel_dim: int) -> None:
    dim, parts = u.shape[channel_dim], tensor.shape[channel_dim]
    if parts == 0 or dim % parts != 0:
        raise ValueError(
            f"selective_scan: dim {dim} of u does not divide into the {parts} groups of {name} {tuple(tensor.shape)}"
        )


def _check(
    grad_y: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    channels_last: bool,
    out_dtype: torch.dtype = torch.float32,
) -> None:
    check_dims("selective_scan", "u", u, "batch, length, dim" if channels_last else "batch, dim, length")
    check_dims("selective_scan", "A", A, "dim, state")
    check_dims(
        "selective_scan", "B", B, "batch, length, groups, state" if channels_last else "batch, groups, state, length"
    )
    channel_dim = 2 if channels_last else 1
    _check_groups(u, "B", B, channel_dim)
    (batch, *_), length, dim, state = u.shape, u.shape[3 - channel_dim], u.shape[channel_dim], A.shape[1]
    groups = B.shape[channel_dim]
    coupling = (batch, length, groups, state) if channels_last else (batch, groups, state, length)
    check(
        "selective_scan",
        {
            "u": (u, u.shape),
            "delta": (delta, u.shape),
            "A": (A, (dim, state)),
            "B": (B, coupling),
            "C": (C, coupling),
            "D": (D, (dim,)),
            "delta_bias": (delta_bias, (dim,)),
            "grad_y": (grad_y, u.shape),
        },
    )
    check_output_dtype("selective_scan", out_dtype)


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    channels_last: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    arguments = (u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last, out_dtype)
    return OPERATOR.select(u.device.type, *arguments).forward(*arguments).contiguous()


def _fake_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last, out_dtype):
    return torch.empty_like(u, dtype=out_dtype, memory_format=torch.contiguous_format)


# An operator cannot return "no tensor": the gradient of an absent D or delta_bias is an empty tensor.
def _gradients(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last)
    grads = OPERATOR.select(u.device.type, *arguments).backward(grad_y, *arguments)
    return tuple(u.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _fake_gradients(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last):
    return tuple(
        u.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (u, delta, A, B, C, D, delta_bias)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.channels_last, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y):
    tensors = ctx.saved_tensors
    grads = torch.ops.vision_kernels.selective_scan_backward(grad_y, *tensors, ctx.delta_softplus, ctx.channels_last)
    return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True)), None, None, None


register(
    "selective_scan",
    _forward,
    _fake_forward,
    _gradients,
    _fake_gradients,
    _backward,
    _setup_context,
    check=_check,
    composition=channels_first(selective_scan_reference),
)


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
