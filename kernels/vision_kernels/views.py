"""Tensors as the compiled kernels read and write them; see csrc/view.h."""

import ctypes
import struct

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_DIMS = 5
# One format for each number of dimensions; unused sizes and strides are padding.
_VIEWS = [
    struct.Struct(f"=Qq{dims}q{8 * (_MAX_DIMS - dims)}x{dims}q{8 * (_MAX_DIMS - dims)}x")
    for dims in range(_MAX_DIMS + 1)
]


def as_c(argument: Tensor | int | None) -> bytes | ctypes.c_int64 | None:
    """Return what ctypes passes to a kernel: a pointer to a view of a tensor, an integer, or a null pointer."""
    if isinstance(argument, Tensor):
        shape, address = argument.shape, argument.data_ptr()
        if not address and 0 not in shape:
            raise ValueError(f"a tensor of shape {tuple(shape)} has no memory: its storage was freed")
        # ctypes passes bytes as a pointer to them
        return _VIEWS[len(shape)].pack(address, _DTYPES[argument.dtype], *shape, *argument.stride())
    return None if argument is None else ctypes.c_int64(argument)


def contiguous_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate a contiguous tensor of the same shape, with the dtype of `tensor` by default."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor; without the overhead of `tensor.to(dtype)` if it has the dtype already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def as_parameter(tensor: Tensor | None) -> Tensor | None:
    """Return an optional tensor as most kernels read parameters: in float32, contiguous."""
    return None if tensor is None else in_dtype(tensor, torch.float32).contiguous()
