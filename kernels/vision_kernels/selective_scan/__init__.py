"""Selective scan: the input-dependent linear recurrence of Mamba."""

from vision_kernels.selective_scan.op import selective_scan

__all__ = ["selective_scan"]
