"""SS2D: selective scans of an image along four routes, merged."""

from vision_kernels.ss2d.op import ss2d

__all__ = ["ss2d"]
