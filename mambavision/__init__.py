"""Mamba vision backbones. Importing this package registers its models with timm."""

from mambavision.checkpoint import load_checkpoint, save_checkpoint
from mambavision.factory import create_model, list_models
from mambavision.inference import fold_batch_norm

__all__ = ["create_model", "fold_batch_norm", "list_models", "load_checkpoint", "save_checkpoint"]
