"""Selective scan in C++ (csrc/cpu/selective_scan.cpp), for float32 and bfloat16; other dtypes are converted."""

import torch
from torch import Tensor

from vision_kernels.arguments import CPU_DTYPES
from vision_kernels.native import Library
from vision_kernels.selective_scan.arguments import Gradients, ScanArguments
from vision_kernels.views import as_parameter, contiguous_like, in_dtype

# The gradients of B and C of a small batch are split into this many tasks, so that all threads have work.
_TASKS = 8
_CHANNELS_PER_TASK = 16


def forward(library: Library, given: ScanArguments) -> Tensor:
    """Return y with the shape of u."""
    y = contiguous_like(given.u, torch.bfloat16 if given.out_dtype == torch.bfloat16 else torch.float32)
    library.call("selective_scan_forward", *_readable(given), y)
    return y


def backward(library: Library, grad_y: Tensor, given: ScanArguments) -> Gradients:
    """Return the gradients of the tensors."""
    batch, length, dim, groups, states = given.sizes()
    inputs, new = _readable(given), given.A.new_empty
    splits = max(1, min(dim // groups // _CHANNELS_PER_TASK, _TASKS // max(1, batch * groups)))
    grad_u, grad_delta = (contiguous_like(each) for each in inputs[:2])
    grad_A = new(batch, dim, states, dtype=torch.float32)
    grad_B, grad_C = (new(batch, groups, splits, length, states, dtype=torch.float32) for _ in range(2))
    grad_D, grad_bias = (new(batch, dim, dtype=torch.float32) for _ in range(2))
    grads = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias)
    grad_y = grad_y if grad_y.dtype in CPU_DTYPES else grad_y.float()
    library.call("selective_scan_backward", grad_y, *inputs, *grads)
    # (batch, groups, splits, length, state) -> as B
    axes = (1, 2) if given.channels_last else (2, 3)
    return (
        grad_u,
        grad_delta,
        grad_A.sum(0),
        grad_B.sum(2).transpose(*axes),
        grad_C.sum(2).transpose(*axes),
        None if given.D is None else grad_D.sum(0),
        None if given.delta_bias is None else grad_bias.sum(0),
    )


def _readable(given: ScanArguments) -> tuple:
    """Return the arguments as the kernel reads them: u and delta alike, the rest in float32 with adjacent states."""
    u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last, _ = given
    dtype = torch.bfloat16 if u.dtype == delta.dtype == torch.bfloat16 else torch.float32
    B, C = (_states_adjacent(each if channels_last else each.transpose(2, 3)) for each in (B, C))
    parameters = as_parameter(D), as_parameter(delta_bias)
    return in_dtype(u, dtype), in_dtype(delta, dtype), as_parameter(A), B, C, *parameters, delta_softplus, channels_last


def _states_adjacent(tensor: Tensor) -> Tensor:
    """Return (..., state) in float32, without a copy if possible."""
    tensor = in_dtype(tensor, torch.float32)
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()
