"""Operators for Mamba vision models. Depends on torch only.

`python -m vision_kernels` shows which backend computes each operator on this machine.
"""

from vision_kernels.conv1d_silu import conv1d_silu
from vision_kernels.selective_scan import selective_scan

__all__ = ["conv1d_silu", "selective_scan"]
