"""Validation of the metadata in checkpoints, which may come from anywhere."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mambavision.errors import CheckpointError

_MAX_NAME_LENGTH = 1000  # characters
_MAX_COUNT = 1 << 40

Fields = Mapping[str, tuple[Callable[[Any], bool], str]]  # name -> (test for valid values, their description)


def check_fields(checkpoint: Mapping[str, Any], source: str, fields: Fields) -> None:
    """Raise a CheckpointError for the first entry with an invalid value; entries may be missing or None.

    Args:
        checkpoint: Content of a checkpoint, or a part of it.
        source: Name of the checkpoint in error messages.
        fields: The entries to check.
    """
    for name, (is_valid, wanted) in fields.items():
        value = checkpoint.get(name)
        if value is not None and not is_valid(value):
            raise CheckpointError(
                f"{source}: its {name} must be {wanted}; use an undamaged copy of the file, or a new file with its "
                "weights only."
            )


def is_count(value: Any) -> bool:
    """Return True for an integer from 0 to a generous limit."""
    return type(value) is int and 0 <= value < _MAX_COUNT


def is_number(value: Any) -> bool:
    """Return True for a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def is_name(value: Any) -> bool:
    """Return True for a string that is neither empty nor overly long."""
    return type(value) is str and 0 < len(value) <= _MAX_NAME_LENGTH


def is_list_of(values: Any, is_valid: Callable[[Any], bool]) -> bool:
    """Return True for a list or tuple of valid values."""
    return isinstance(values, list | tuple) and all(map(is_valid, values))


def are_class_names(value: Any) -> bool:
    """Return True for a list of distinct names."""
    return is_list_of(value, is_name) and len(set(value)) == len(value) > 0


def is_optimizer(value: Any) -> bool:
    """Return True for the state of a torch optimizer."""
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    states, groups = value["state"], value.get("param_groups")
    return all(isinstance(state, Mapping) for state in states.values()) and is_list_of(
        groups, lambda group: isinstance(group, Mapping) and is_list_of(group.get("params", ()), is_count)
    )


def is_mapping(value: Any) -> bool:
    """Return True for a dictionary."""
    return isinstance(value, Mapping)
