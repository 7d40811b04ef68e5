"""Short depthwise convolution over time followed by SiLU: the layer before the scan in a Mamba mixer."""

from vision_kernels.conv1d_silu.op import conv1d_silu

__all__ = ["conv1d_silu"]
