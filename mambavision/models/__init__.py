"""The architectures, one file each. Importing this package registers their models with timm."""

from mambavision.models.mambavision import MambaVision
from mambavision.models.segman import SegMANEncoder
from mambavision.models.vmamba import VMamba

__all__ = ["MambaVision", "SegMANEncoder", "VMamba"]
