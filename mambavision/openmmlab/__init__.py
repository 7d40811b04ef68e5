"""The adapter to OpenMMLab: importing this package, before mmcv.ops, is all that its libraries need.

In a config: ``custom_imports = dict(imports=["mambavision.openmmlab"])``. It registers the backbones, makes reading
checkpoints safe and writing them atomic, and stands in for mmcv's compiled operators where they are not installed.
"""

from mambavision.openmmlab import mmcv_ops

mmcv_ops.install()  # before anything imports mmcv.ops

from mambavision.openmmlab import checkpoints, hooks, json_logs, loops  # noqa: E402, F401
from mambavision.openmmlab.backbones.features import MM_mamba_vision, RegisteredBackbone  # noqa: E402
from mambavision.openmmlab.backbones.segman import (  # noqa: E402
    SegMANEncoder_b,
    SegMANEncoder_l,
    SegMANEncoder_l2,
    SegMANEncoder_s,
    SegMANEncoder_t,
)
from mambavision.openmmlab.backbones.vssm import MM_VSSM  # noqa: E402

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
