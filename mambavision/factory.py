"""Creation and listing of models by name, based on timm's registry."""

import os
from typing import Any, cast

import timm

from mambavision import models
from mambavision.checkpoint import load_checkpoint
from mambavision.errors import ArgumentError
from mambavision.text import nearest
from mambavision.timm_model import TimmModel

# timm knows a model's module by the last part of its name.
_MODULES = [getattr(models, name).__module__.rpartition(".")[-1] for name in models.__all__]


def list_models(filter: str | list[str] = "", **kwargs: Any) -> list[str]:
    """Return the names of this package's models, in natural order.

    Args:
        filter: Wildcards as in ``mamba_vision*``.
        **kwargs: Passed on to ``timm.list_models``, for example ``pretrained=True``.
    """
    return timm.list_models(filter, module=_MODULES, **kwargs)


def expand_model_name(given: str, **kwargs: Any) -> list[str]:
    """Expand ``all`` or a pattern to the names of this package's models; return any other name unchanged.

    Args:
        given: Name, wildcards as in ``mamba_vision*``, or ``all``.
        **kwargs: Passed on to `list_models`.

    Raises:
        ArgumentError: The pattern matches no model.
    """
    if given != "all" and "*" not in given:
        return [given]
    names = list_models("" if given == "all" else given, **kwargs)
    if not names:
        raise ArgumentError(f"{given}: matches none of {', '.join(list_models())}.")
    return names


def create_model(
    name: str, pretrained: bool = False, checkpoint_path: str | os.PathLike | None = None, **kwargs: Any
) -> TimmModel:
    """Create a model of this package, or any other that timm knows.

    Args:
        name: Registered name; `list_models` gives this package's.
        pretrained: Load the released weights, which are cached by the Hugging Face or torch hub.
        checkpoint_path: Load these weights instead, strictly (`mambavision.load_checkpoint`).
        **kwargs: Passed on to the model, for example ``num_classes``, ``in_chans``, ``drop_path_rate``, or
            ``features_only`` with ``out_indices``.

    Raises:
        ArgumentError: The name is unknown (the message suggests the nearest one), or `checkpoint_path` is combined with
            ``features_only``.
        CheckpointError: The weights cannot be loaded.
        TypeError, ValueError: The model does not accept an argument.
    """
    check_model_name(name)
    features_only = kwargs.pop("features_only", False)
    if checkpoint_path and features_only:
        raise ArgumentError(
            f"{name}: checkpoint_path and features_only cannot be combined, because the file has a classifier and the "
            "features have none; create the whole model and call forward_intermediates, or load with strict=False."
        )
    model = timm.create_model(name, pretrained=pretrained, features_only=features_only or None, **kwargs)
    model = cast(TimmModel, model)
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path)
    return model


def check_model_name(name: str) -> None:
    """Raise an ArgumentError that suggests the nearest name if timm's registry lacks `name`."""
    if ":" not in name and not timm.is_model(name.split(".")[0]):  # hf-hub:… and local-dir:… are timm's to resolve
        raise ArgumentError(
            f"unknown model {name!r}.{nearest(name, list_models()) or nearest(name, timm.list_models())}"
        )
