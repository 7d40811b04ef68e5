"""The four routes along which an image is read as a sequence, and back."""

from vision_kernels.cross_scan.op import cross_merge, cross_scan
from vision_kernels.cross_scan.routes import ROUTES, Route

__all__ = ["ROUTES", "Route", "cross_merge", "cross_scan"]
