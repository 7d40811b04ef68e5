"""Checks of operator arguments before any work starts."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

CPU_DTYPES = (torch.float32, torch.bfloat16)  # of the compiled kernels
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOVED = {
    *_COMPUTED, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64,
    torch.complex128,
}  # fmt: skip


def check(operator: str, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Check the shape, device, dtype and layout of tensors.

    Args:
        operator: Name of the operator, for the message.
        expected: For each argument the tensor, or None if it is absent, and its expected shape. The first one is
            present, and determines the device of all.

    Raises:
        ValueError: A tensor has another shape, is on another device than the first, is not dense, or has a dtype that
            operators do not compute with. Names the argument and both shapes.
    """
    first, (leader, _) = next(iter(expected.items()))
    assert leader is not None
    device = leader.device
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} "
                f"to go with {first} {tuple(leader.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{operator}: {name} is on {tensor.device}, {first} is on {device}")
        if tensor.dtype not in _COMPUTED:
            raise ValueError(_not_computed(operator, name, "tensor", tensor.dtype))
        if tensor.layout is not torch.strided:
            raise ValueError(_not_dense(operator, name, tensor))


def check_dims(operator: str, name: str, tensor: Tensor, layout: str) -> None:
    """Require one dimension for each name in `layout`, as in "batch, dim, length".

    Raises:
        ValueError: The tensor has another number of dimensions.
    """
    if tensor.ndim != layout.count(",") + 1:
        raise ValueError(f"{operator}: {name} must be ({layout}), got shape {tuple(tensor.shape)}")


def check_states(operator: str, A: Tensor) -> None:
    """Require at least one state in A (dim, state).

    Raises:
        ValueError: A has no states.
    """
    if A.shape[1] == 0:
        raise ValueError(f"{operator}: A has shape {tuple(A.shape)}: at least one state is needed")


def check_moved(operator: str, name: str, tensor: Tensor) -> None:
    """Require a dense tensor whose dtype PyTorch can rearrange.

    Raises:
        ValueError: The tensor is sparse or has another dtype, such as a quantized or 8-bit floating-point type.
    """
    if tensor.layout is not torch.strided:
        raise ValueError(_not_dense(operator, name, tensor))
    if tensor.dtype not in _MOVED:
        raise ValueError(f"{operator}: {name} is {tensor.dtype}, which PyTorch cannot rearrange: convert it first")


def check_output_dtype(operator: str, dtype: torch.dtype) -> None:
    """Require a dtype that operators compute with.

    Raises:
        ValueError: Operators do not compute with it.
    """
    if dtype not in _COMPUTED:
        raise ValueError(_not_computed(operator, "out_dtype", "type", dtype))


def why_not_dtypes(verb: str, supported: Sequence[torch.dtype], *found: torch.dtype) -> str | None:
    """Return a sentence such as "computes float32 and bfloat16, not torch.int64", or None if all are supported."""
    for dtype in found:
        if dtype not in supported:
            *names, last = (str(each).removeprefix("torch.") for each in supported)
            return f"{verb} {', '.join(names)} and {last}, not {dtype}"
    return None


def _not_computed(operator: str, name: str, what: str, dtype: torch.dtype) -> str:
    return f"{operator}: {name} must be a real floating-point {what}, got {dtype}; take one of {_names(_COMPUTED)}"


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(each).removeprefix("torch.") for each in dtypes)


def _not_dense(operator: str, name: str, tensor: Tensor) -> str:
    return f"{operator}: {name} must be dense, got {tensor.layout}: call to_dense() first"
