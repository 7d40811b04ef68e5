"""Operators for Mamba vision models. Depends on torch only.

`python -m vision_kernels` shows which backend computes each operator on this machine.
"""

from vision_kernels.conv1d_silu import conv1d_silu
from vision_kernels.cross_scan import cross_merge, cross_scan
from vision_kernels.mamba_mixer import mamba_mixer
from vision_kernels.neighborhood_attention import neighborhood_attention
from vision_kernels.selective_scan import selective_scan
from vision_kernels.ss2d import ss2d

__all__ = [
    "conv1d_silu",
    "cross_merge",
    "cross_scan",
    "mamba_mixer",
    "neighborhood_attention",
    "selective_scan",
    "ss2d",
]
