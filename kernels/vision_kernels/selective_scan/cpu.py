"""Selective scan in C++ (csrc/cpu/selective_scan.cpp), for float32 and bfloat16; other types are converted."""

import torch
from torch import Tensor

from vision_kernels import native

# Tasks that the gradients of B and C of a small batch are split into, so that all threads have work.
_TASKS = 8
_CHANNELS_PER_TASK = 16


def selective_scan_cpu(
    instruction_set, u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last, out_dtype
) -> Tensor:
    """Return y with the shape of u. Shapes as in the operator."""
    inputs = _inputs(u, delta, A, B, C, D, delta_bias, channels_last)
    dtype = out_dtype if out_dtype == torch.bfloat16 else torch.float32
    y = torch.empty_like(u, dtype=dtype, memory_format=torch.contiguous_format)
    native.call("selective_scan_forward", instruction_set, *inputs, delta_softplus, channels_last, y)
    return y.to(out_dtype)


def selective_scan_cpu_backward(
    instruction_set, grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the seven tensor inputs (None where an optional input is absent)."""
    inputs = _inputs(u, delta, A, B, C, D, delta_bias, channels_last)
    if grad_y.dtype not in (torch.float32, torch.bfloat16):
        grad_y = grad_y.float()
    (dim, state), batch = A.shape, u.shape[0]
    length, groups = (B.shape[1], B.shape[2]) if channels_last else (B.shape[3], B.shape[1])
    splits = max(1, min(dim // groups // _CHANNELS_PER_TASK, _TASKS // max(1, batch * groups)))
    grad_u, grad_delta = (u.new_empty(u.shape, dtype=inputs[0].dtype) for _ in range(2))
    grad_A = A.new_empty(batch, dim, state, dtype=torch.float32)
    grad_B, grad_C = (B.new_empty(batch, groups, splits, length, state, dtype=torch.float32) for _ in range(2))
    grad_D, grad_bias = (A.new_empty(batch, dim, dtype=torch.float32) for _ in range(2))
    grads = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias)
    native.call("selective_scan_backward", instruction_set, grad_y, *inputs, delta_softplus, channels_last, *grads)
    # (batch, groups, splits, length, state) -> as B
    grad_B, grad_C = (
        each.sum(2).transpose(1, 2) if channels_last else each.sum(2).transpose(2, 3) for each in (grad_B, grad_C)
    )
    return (
        grad_u.to(u.dtype),
        grad_delta.to(delta.dtype),
        grad_A.sum(0).to(A.dtype),
        grad_B.to(B.dtype),
        grad_C.to(C.dtype),
        None if D is None else grad_D.sum(0).to(D.dtype),
        None if delta_bias is None else grad_bias.sum(0).to(delta_bias.dtype),
    )


def _inputs(u, delta, A, B, C, D, delta_bias, channels_last) -> tuple[Tensor | None, ...]:
    """The types and layouts that the kernel reads: u and delta of one type, the rest float32 with states adjacent."""
    dtype = torch.bfloat16 if u.dtype == delta.dtype == torch.bfloat16 else torch.float32
    return (
        u.to(dtype),
        delta.to(dtype),
        A.float().contiguous(),
        _states_adjacent(B if channels_last else B.transpose(2, 3)),
        _states_adjacent(C if channels_last else C.transpose(2, 3)),
        None if D is None else D.float().contiguous(),
        None if delta_bias is None else delta_bias.float().contiguous(),
    )


def _states_adjacent(tensor: Tensor) -> Tensor:
    """(..., state) in float32, without a copy if it can be."""
    tensor = tensor.float()
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()
