"""Backbones that OpenMMLab configs name. Importing this package registers them."""

from mambavision.openmmlab.backbones.mambavision import MM_mamba_vision
from mambavision.openmmlab.backbones.registered import RegisteredBackbone
from mambavision.openmmlab.backbones.segman import (
    SegMANEncoder_b,
    SegMANEncoder_l,
    SegMANEncoder_l2,
    SegMANEncoder_s,
    SegMANEncoder_t,
)
from mambavision.openmmlab.backbones.vssm import MM_VSSM

__all__ = [
    "MM_VSSM",
    "MM_mamba_vision",
    "RegisteredBackbone",
    "SegMANEncoder_b",
    "SegMANEncoder_l",
    "SegMANEncoder_l2",
    "SegMANEncoder_s",
    "SegMANEncoder_t",
]
