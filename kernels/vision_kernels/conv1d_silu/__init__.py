"""Short depthwise convolution over time followed by SiLU: what stands in front of the scan in a Mamba mixer."""

from vision_kernels.conv1d_silu.op import conv1d_silu

__all__ = ["conv1d_silu"]
