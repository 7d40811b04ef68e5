"""`selective_scan`: argument checks, backends, registration."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.arguments import check, check_dims, check_output_dtype, check_states
from vision_kernels.backends import Implementation, Operator
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.native import compiled_for_cpu, why_not_float32
from vision_kernels.registration import register
from vision_kernels.selective_scan import cpu, cuda, reference, torch_scan
from vision_kernels.selective_scan.arguments import ScanArguments
from vision_kernels.triton_support import compiled_by_triton

OPERATOR = Operator(
    "selective_scan",
    (
        compiled_for_cuda(cuda.forward, cuda.backward, cuda.why_unable),
        *compiled_for_cpu(cpu.forward, cpu.backward, why_not_float32),
        compiled_by_triton("vision_kernels.selective_scan.triton_scan"),
        Implementation("torch", torch_scan.forward, torch_scan.backward, "plain PyTorch, time-major in place"),
        Implementation("reference", reference.forward, reference.backward, "the definition, step by step"),
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

    For each batch entry and channel d, starting from the state s = 0 of size N::

        delta_t = softplus(delta_t + delta_bias)                         (bias and softplus optional)
        s_t     = exp(delta_t A_d) s_{t-1} + delta_t B_t u_t
        y_t     = <C_t, s_t> + D_d u_t                                   (D optional)

    Computed in float32, or in float64 if `u` is float64, regardless of the other dtypes. Differentiable once in all
    tensors.

    Args:
        u: (batch, dim, length) input.
        delta: (batch, dim, length) step size, or (batch, deltas, length) if each is shared by dim / deltas consecutive
            channels.
        A: (dim, state) state matrix, diagonal; negative for a stable recurrence.
        B: (batch, state, length), or (batch, groups, state, length) if each is shared by dim / groups consecutive
            channels.
        C: As B.
        D: (dim,) skip weight.
        delta_bias: (dim,), or (deltas,), added to `delta` before the softplus.
        delta_softplus: Apply softplus to `delta`.
        channels_last: u, delta and y are (batch, length, dim), B and C (batch, length, [groups,] state) instead, which
            is faster on the CPU. Tensors may have any strides in both layouts.
        out_dtype: Dtype of y, by default that of `u`.

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
    """Return delta and delta_bias with a step size for every channel of u."""
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


def _check(grad_y: Tensor | None, given: ScanArguments) -> None:
    u, A, B, last = given.u, given.A, given.B, given.channels_last
    check_dims("selective_scan", "u", u, "batch, length, dim" if last else "batch, dim, length")
    check_dims("selective_scan", "A", A, "dim, state")
    check_states("selective_scan", A)
    check_dims("selective_scan", "B", B, "batch, length, groups, state" if last else "batch, groups, state, length")
    _check_groups(u, "B", B, 2 if last else 1)
    batch, length, dim, groups, states = given.sizes()
    coupling = (batch, length, groups, states) if last else (batch, groups, states, length)
    check(
        "selective_scan",
        {
            "u": (u, u.shape),
            "delta": (given.delta, u.shape),
            "A": (A, (dim, states)),
            "B": (B, coupling),
            "C": (given.C, coupling),
            "D": (given.D, (dim,)),
            "delta_bias": (given.delta_bias, (dim,)),
            "grad_y": (grad_y, u.shape),
        },
    )
    check_output_dtype("selective_scan", given.out_dtype)


register(OPERATOR, ScanArguments, _check, reference.forward)


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
