"""Checks of the weights in checkpoints against a model, and models built with them."""

from typing import Any

import torch
from mmengine import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn

from mambavision.checkpoint import check_values, extract_state_dict
from mambavision.errors import CheckpointError
from mambavision.openmmlab.config import explained
from mambavision.openmmlab.training.config_steps import drop_pretrained


def trained_model(config: Config, checkpoint: dict[str, Any], source: str, device: torch.device) -> BaseModel:
    """Build the model of a config for inference, with the weights of a checkpoint.

    Args:
        config: Config of the model, whose scope must be the default.
        checkpoint: Content of its checkpoint.
        source: Name of the checkpoint in error messages.
        device: Device of the model.

    Raises:
        UserError: The config is inconsistent.
        CheckpointError: The checkpoint belongs to another model.
    """
    config = drop_pretrained(config)
    with explained(config.filename):
        model = revert_sync_batchnorm(MODELS.build(config.model))
    check_weights(model, checkpoint, source)
    model.load_state_dict(extract_state_dict(checkpoint), strict=False)  # old files lack batch counters
    return model.to(device).eval()


def check_some_weights(model: nn.Module, checkpoint: dict[str, Any], source: str) -> None:
    """Raise a CheckpointError unless a checkpoint has most weights of a model; a model for other classes passes."""
    own, theirs = _unwrapped(model).state_dict(), extract_state_dict(checkpoint, source=source)
    fitting = {key: theirs[key] for key in own if key in theirs and theirs[key].shape == own[key].shape}
    if len(fitting) < len(own) / 2:
        raise CheckpointError(
            f"{source}: belongs to another model than the config: only {len(fitting)} of {len(own)} entries fit; for "
            "the weights of a classifier, use --cfg-options model.backbone.pretrained=FILE instead of load_from."
        )
    check_values(_unwrapped(model), fitting, source)


def check_weights(model: nn.Module, checkpoint: dict[str, Any], source: str) -> None:
    """Raise a CheckpointError unless a checkpoint contains exactly the weights of a model."""
    own, theirs = _unwrapped(model).state_dict(), extract_state_dict(checkpoint, source=source)
    missing = [key for key in own if key not in theirs and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in theirs if key not in own]
    reshaped = [key for key in own if key in theirs and own[key].shape != theirs[key].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if any(problems.values()):
        found = ", ".join(f"{len(keys)} {what} ({keys[0]})" for what, keys in problems.items() if keys)
        raise CheckpointError(f"{source}: belongs to another model than the config: {found}.")
    check_values(_unwrapped(model), theirs, source)


def _unwrapped(model: nn.Module) -> nn.Module:
    # Of DistributedDataParallel, of test-time augmentation.
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def check_classes(dataset: Any, checkpoint: dict[str, Any], source: str) -> None:
    """Raise a CheckpointError if a checkpoint was trained for other classes than those of a data set."""
    theirs = checkpoint.get("meta", {}).get("dataset_meta", {}).get("classes")
    ours = dataset.metainfo.get("classes")
    if theirs is None or ours is None or tuple(theirs) == tuple(ours):
        return
    differing = next((pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]), None)
    where = f"; the first that differs is {differing[0]!r} there and {differing[1]!r} here" if differing else ""
    raise CheckpointError(
        f"{source}: was trained for {len(theirs)} classes, but the data have {len(ours)}{where}; use the config it "
        "was trained with, or list its classes in its order in the data's metainfo."
    )
