"""MambaVision's mixer between its outer projections: convolution, projections and selective scan."""

from vision_kernels.mamba_mixer.composed import compose_mixer
from vision_kernels.mamba_mixer.op import mamba_mixer

__all__ = ["compose_mixer", "mamba_mixer"]
