"""Validation of the metadata in checkpoints of classifiers, which may come from anywhere."""

from collections.abc import Mapping
from typing import Any

from timm import is_model
from torch import Tensor

from mambavision.checkpoint import WEIGHT_KEYS
from mambavision.errors import CheckpointError
from mambavision.metadata import (
    Fields,
    are_class_names,
    check_fields,
    is_count,
    is_list_of,
    is_mapping,
    is_name,
    is_number,
    is_optimizer,
)

_MAX_ARGUMENT = 1 << 20  # of models, including the number of classes
_MAX_SIDE = 1 << 14  # pixels
# Arguments with which timm would read other files or the network.
_LOADING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}
_DEPTHS = {"depth", "depths", "layers", "num_layers"}
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box")


def check_model(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise a CheckpointError if the metadata about the model are invalid.

    Args:
        checkpoint: Content of the checkpoint.
        source: Its name in error messages.
    """
    check_fields(checkpoint, source, _MODEL)
    arguments = checkpoint.get("model_kwargs")
    entries = next((checkpoint[key] for key in WEIGHT_KEYS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    if arguments and any(_total(arguments.get(name)) > len(entries) for name in _DEPTHS):
        raise CheckpointError(f"{source}: its model_kwargs describe more layers than it has weights.")


def check_training(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise a CheckpointError if the metadata about model or training are invalid; see `check_model`."""
    check_model(checkpoint, source)
    check_fields(checkpoint, source, _TRAINING)


def _is_model_name(value: Any) -> bool:
    """Return True for a name in timm's registry; ``hf-hub:`` and ``local-dir:`` would refer to other files."""
    return is_name(value) and ":" not in value and is_model(value.split(".")[0])


def _are_arguments(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(type(key) is str and key not in _LOADING for key in value):
        return False
    return all(map(_is_argument, value.values()))


def _is_argument(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 1000 and all(map(_is_argument, value))
    if isinstance(value, Mapping):
        return all(type(key) is str for key in value) and all(map(_is_argument, value.values()))
    return value is None or type(value) in (bool, str) or (is_number(value) and abs(value) <= _MAX_ARGUMENT)


def _total(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(map(_total, value))
    return value if type(value) is int else 0


def _is_data_config(value: Any) -> bool:
    """Return True for timm's data config, whose entries are all optional."""
    if not isinstance(value, Mapping):
        return False
    size, mean, std = (value.get(key) for key in ("input_size", "mean", "std"))
    crop = value.get("crop_pct")
    counts = (
        1,
        size[0] if isinstance(size, list | tuple) and size else 3,
    )  # one value, or one per channel
    return (
        (size is None or (is_list_of(size, _is_side) and len(size) == 3))
        and (mean is None or (is_list_of(mean, is_number) and len(mean) in counts))
        and (std is None or (is_list_of(std, lambda each: is_number(each) and each > 0) and len(std) in counts))
        and (crop is None or (is_number(crop) and 0 < crop <= 2))
        and value.get("crop_mode") in (None, "squash", "border", "center")
        and value.get("interpolation") in (None, "", *_INTERPOLATIONS)
    )


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_SIDE


def _are_checkpoints(value: Any) -> bool:
    """Return True for a state of `engine.run_folder.Checkpoints`."""
    if not isinstance(value, Mapping) or not {"best", "kept"} <= value.keys():
        return False
    return (value["best"] is None or _is_ranked(value["best"])) and is_list_of(value["kept"], _is_ranked)


def _is_ranked(value: Any) -> bool:
    """Return True for a pair (epoch, metric); the metric of a diverged epoch is not finite."""
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return is_pair and is_count(value[0]) and type(value[1]) in (int, float)


def _are_processes(value: Any) -> bool:
    """Return True for the states of processes that `engine.train` saves."""
    return is_list_of(
        value,
        lambda own: (
            isinstance(own, Mapping)
            and {"random", "buffers", "epoch_so_far"} <= own.keys()
            and _are_random_states(own["random"])
            and isinstance(own["buffers"], Mapping)
            and all(isinstance(buffer, Tensor) for buffer in own["buffers"].values())
            and isinstance(own["epoch_so_far"], Mapping)
            and all(type(own["epoch_so_far"].get(key)) in (int, float) for key in ("loss_sum", "images"))
        ),
    )


def _are_random_states(value: Any) -> bool:
    if not isinstance(value, Mapping) or not {"python", "numpy", "torch", "cuda"} <= value.keys():
        return False
    python, numpy = value["python"], value["numpy"]
    return (
        isinstance(python, list | tuple)
        and len(python) == 3
        and isinstance(python[1], list)
        and isinstance(numpy, list | tuple)
        and len(numpy) == 5
        and isinstance(numpy[1], Tensor)
        and isinstance(value["torch"], Tensor)
    )


_MODEL: Fields = {
    "arch": (_is_model_name, "the name of a model in timm's registry"),
    "model_kwargs": (_are_arguments, "arguments of the model that load nothing"),
    "data_config": (_is_data_config, "timm's settings for preprocessing"),
    "classes": (are_class_names, "a list of distinct names"),
    "exif_transpose": (lambda value: type(value) is bool, "true or false"),
}
_TRAINING: Fields = {
    "epoch": (is_count, "an integer from 0"),
    "next_batch": (is_count, "an integer from 0"),
    "batching": (is_mapping, "settings by name"),
    "args": (lambda value: is_mapping(value) or hasattr(value, "__dict__"), "options by name"),
    "optimizer": (is_optimizer, "the state of a torch optimizer"),
    "amp_scaler": (is_mapping, "the state of a loss scale"),
    "plateau": (lambda value: is_mapping(value) and {"state", "restore_lr"} <= value.keys(), "a schedule's state"),
    "checkpoints": (_are_checkpoints, "the best and the kept epochs"),
    "processes": (_are_processes, "the state of each process"),
}
