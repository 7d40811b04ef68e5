"""Adapter to OpenMMLab, to be imported before mmcv.ops.

Configs import it by ``custom_imports = dict(imports=["mambavision.openmmlab"])``. The import registers the backbones
and calls `mambavision.openmmlab.adaptation.adapt`, the only function that changes the behaviour of OpenMMLab's modules.
"""

from mambavision.openmmlab.adaptation import adapt

adapt()  # before anything imports mmcv.ops

from mambavision.openmmlab.backbones import (  # noqa: E402
    MM_VSSM,
    MM_mamba_vision,
    RegisteredBackbone,
    SegMANEncoder_b,
    SegMANEncoder_l,
    SegMANEncoder_l2,
    SegMANEncoder_s,
    SegMANEncoder_t,
)
from mambavision.openmmlab.training import hooks, loops  # noqa: E402, F401 - registers them

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
