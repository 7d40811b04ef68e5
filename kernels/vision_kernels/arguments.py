"""Checks of operator arguments, made before any work starts."""

from collections.abc import Mapping

from torch import Tensor


def check(operator: str, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Compare tensors with the shapes they must have; the first one says on which device all must be.

    Args:
        operator: Name of the operator, for the message.
        expected: For each argument the tensor, or None if it is absent, and its shape.

    Raises:
        ValueError: A tensor has another shape, is on another device than the first, or is not of a real
            floating-point type. Names the argument and both shapes.
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
        if not tensor.is_floating_point():
            raise ValueError(f"{operator}: {name} must be a real floating-point tensor, got {tensor.dtype}")


def check_dims(operator: str, name: str, tensor: Tensor, layout: str) -> None:
    """Require as many dimensions as `layout` names, as in "batch, dim, length".

    Raises:
        ValueError: The tensor has another number of dimensions.
    """
    if tensor.ndim != layout.count(",") + 1:
        raise ValueError(f"{operator}: {name} must be ({layout}), got shape {tuple(tensor.shape)}")
