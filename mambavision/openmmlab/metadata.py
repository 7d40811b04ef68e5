"""Validation of the metadata in checkpoints of mmengine."""

from collections.abc import Mapping
from typing import Any

from mambavision.metadata import (
    Fields,
    check_fields,
    is_count,
    is_list_of,
    is_mapping,
    is_name,
    is_optimizer,
)


def check_metadata(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise a CheckpointError if the metadata of a checkpoint, about its training and classes, are invalid.

    Args:
        checkpoint: Content of the checkpoint.
        source: Its name in error messages.
    """
    check_fields(checkpoint, source, _CONTENT)
    meta = {
        key.lower() if isinstance(key, str) else key: value for key, value in (checkpoint.get("meta") or {}).items()
    }
    check_fields(meta, f"{source}: meta", _META)
    dataset = {
        key.lower() if isinstance(key, str) else key: value for key, value in (meta.get("dataset_meta") or {}).items()
    }
    check_fields(dataset, f"{source}: dataset_meta", _CLASSES)


def _is_palette(value: Any) -> bool:
    """Return True for a list of colours, or the word from which mmdet's visualizer makes colours."""
    return value == "random" or is_list_of(value, lambda colour: is_list_of(colour, _is_byte) and len(colour) == 3)


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def _is_hub(value: Any) -> bool:
    return is_mapping(value) and all(map(is_mapping, value.values()))


def _are_schedules(value: Any) -> bool:
    schedules = value.values() if is_mapping(value) else [value]
    return all(is_list_of(each, is_mapping) for each in schedules)


_CLASSES: Fields = {
    "classes": (lambda value: is_list_of(value, is_name), "a list of names"),
    "palette": (_is_palette, "a list of colours, each three numbers from 0 to 255"),
}
_META: Fields = {
    **_CLASSES,
    "epoch": (is_count, "an integer from 0"),
    "iter": (is_count, "an integer from 0"),
    "seed": (is_count, "an integer from 0"),
    "dataset_meta": (is_mapping, "settings of a data set by name"),
}
_CONTENT: Fields = {
    "meta": (is_mapping, "settings by name"),
    "optimizer": (lambda value: is_optimizer(value) or _are_optimizers(value), "the state of a torch optimizer"),
    "param_schedulers": (_are_schedules, "the states of schedules"),
    "message_hub": (_is_hub, "logged values and settings by name"),
}


def _are_optimizers(value: Any) -> bool:
    """Return True for the states of several optimizers by name."""
    return is_mapping(value) and len(value) > 0 and all(map(is_optimizer, value.values()))
