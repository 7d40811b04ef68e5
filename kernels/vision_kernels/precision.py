"""The precision that operators compute in."""

import torch
from torch import Tensor


def compute_dtype(leading: Tensor) -> torch.dtype:
    """Operators compute in float32, whatever the inputs are, except that float64 of the first input stays float64."""
    return torch.float64 if leading.dtype == torch.float64 else torch.float32
