"""The precision in which operators compute."""

import torch
from torch import Tensor


def compute_dtype(leading: Tensor) -> torch.dtype:
    """Return float64 if the first input is float64, otherwise float32."""
    return torch.float64 if leading.dtype == torch.float64 else torch.float32
