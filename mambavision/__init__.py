"""Mamba vision backbones. Importing this package registers its models with timm."""

from mambavision.checkpoint import load_checkpoint, save_checkpoint
from mambavision.errors import ArgumentError, CheckpointError, DataError, NonFiniteError, OutputError, UserError
from mambavision.factory import create_model, list_models
from mambavision.inference import fold_batch_norm

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "NonFiniteError",
    "OutputError",
    "UserError",
    "create_model",
    "fold_batch_norm",
    "list_models",
    "load_checkpoint",
    "save_checkpoint",
]
