"""Operators for Mamba vision models. Depends on torch only.

`python -m vision_kernels` shows which backend computes each operator on this machine.
"""

from vision_kernels.neighborhood_attention import neighborhood_attention
from vision_kernels.selective_scan import selective_scan

__all__ = ["neighborhood_attention", "selective_scan"]
