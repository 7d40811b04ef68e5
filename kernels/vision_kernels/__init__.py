"""Operators for Mamba vision models. Depends on torch only.

`python -m vision_kernels` shows which backend computes each operator on this machine.
"""

from vision_kernels.selective_scan import selective_scan

__all__ = ["selective_scan"]
