"""Checks of what a checkpoint says beside its weights: a file from elsewhere may say anything."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mambavision.errors import CheckpointError

_LONGEST_NAME = 1000  # characters
_LARGEST_COUNT = 1 << 40

Fields = Mapping[str, tuple[Callable[[Any], bool], str]]  # name -> (whether a value is possible, what is)


def check_fields(checkpoint: Mapping[str, Any], source: str, fields: Fields) -> None:
    """Raise a CheckpointError for the first entry whose value is impossible; entries may be missing or None.

    Args:
        checkpoint: Content of a checkpoint, or a part of it.
        source: Names it in messages.
        fields: The entries to check.
    """
    for name, (is_possible, wanted) in fields.items():
        value = checkpoint.get(name)
        if value is not None and not is_possible(value):
            raise CheckpointError(
                f"{source}: its {name} must be {wanted}; take an undamaged copy of the file, or only its weights in a "
                "new file."
            )


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on, within reason."""
    return type(value) is int and 0 <= value < _LARGEST_COUNT


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def is_name(value: Any) -> bool:
    """Whether a value is a text that is neither empty nor endless."""
    return type(value) is str and 0 < len(value) <= _LONGEST_NAME


def is_list_of(values: Any, is_possible: Callable[[Any], bool]) -> bool:
    """Whether values are a list or tuple of possible ones."""
    return isinstance(values, list | tuple) and all(map(is_possible, values))


def are_class_names(value: Any) -> bool:
    """Whether a value is a list of different names."""
    return is_list_of(value, is_name) and len(set(value)) == len(value) > 0


def is_optimizer(value: Any) -> bool:
    """Whether a value is the state of an optimizer of torch."""
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    states, groups = value["state"], value.get("param_groups")
    return all(isinstance(state, Mapping) for state in states.values()) and is_list_of(
        groups, lambda group: isinstance(group, Mapping) and is_list_of(group.get("params", ()), is_count)
    )


def is_mapping(value: Any) -> bool:
    """Whether a value is a dictionary."""
    return isinstance(value, Mapping)
