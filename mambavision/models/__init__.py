"""The architectures, one file each. Importing this package registers their models with timm."""

from mambavision.models.mambavision import MambaVision

__all__ = ["MambaVision"]
