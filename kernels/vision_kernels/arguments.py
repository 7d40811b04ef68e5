"""Checks of operator arguments, made before any work starts."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What PyTorch can flip and add up, and so every backend can.
_MOVED = (
    *_COMPUTED,
    *(torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def check(operator: str, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Compare tensors with the shapes they must have; the first one says on which device all must be.

    Args:
        operator: Name of the operator, for the message.
        expected: For each argument the tensor, or None if it is absent, and its shape.

    Raises:
        ValueError: A tensor has another shape, is on another device than the first, is not dense, or is not of a
            type that operators compute with. Names the argument and both shapes.
    """
    first, (leader, _) = next(iter(expected.items()))
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
    """Require as many dimensions as `layout` names, as in "batch, dim, length".

    Raises:
        ValueError: The tensor has another number of dimensions.
    """
    if tensor.ndim != layout.count(",") + 1:
        raise ValueError(f"{operator}: {name} must be ({layout}), got shape {tuple(tensor.shape)}")


def check_moved(operator: str, name: str, tensor: Tensor) -> None:
    """Require a dense tensor of a type that PyTorch can reorder and add up, which includes integers.

    Raises:
        ValueError: It is sparse, or of another type.
    """
    if tensor.layout is not torch.strided:
        raise ValueError(_not_dense(operator, name, tensor))
    if tensor.dtype not in _MOVED:
        raise ValueError(f"{operator}: {name} must have one of the types {_names(_MOVED)}, got {tensor.dtype}")


def check_output_dtype(operator: str, dtype: torch.dtype) -> None:
    """Require a dtype that operators compute with.

    Raises:
        ValueError: It is another one.
    """
    if dtype not in _COMPUTED:
        raise ValueError(_not_computed(operator, "out_dtype", "type", dtype))


def _not_computed(operator: str, name: str, what: str, dtype: torch.dtype) -> str:
    return f"{operator}: {name} must be a real floating-point {what}, got {dtype}; take one of {_names(_COMPUTED)}"


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(each).removeprefix("torch.") for each in dtypes)


def _not_dense(operator: str, name: str, tensor: Tensor) -> str:
    return f"{operator}: {name} must be dense, got {tensor.layout}: call to_dense() first"
