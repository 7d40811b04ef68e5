"""MambaVision as an OpenMMLab backbone."""

import inspect
from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from mambavision.models import MambaVision
from mambavision.openmmlab.backbones.features import FeatureMaps, OutNorm, sort_arguments


@MODELS.register_module()
class MM_mamba_vision(FeatureMaps, MambaVision):  # noqa: N801
    """MambaVision under the original's name, with its arguments and its parameter names.

    Takes the arguments of `FeatureMaps` and of `mambavision.models.MambaVision`. Configs that inherit a ResNet or Swin
    backbone without deleting it, like the original ones, behave as in the original: inherited arguments are ignored,
    and `drop_path_rate` is 0.2 whatever the config says.
    """

    def __init__(
        self,
        dim: int,
        in_dim: int,
        depths: Sequence[int],
        window_size: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        norm_layer: OutNorm = "ln2d",
        layer_scale: float | None = None,
        **others: Any,
    ) -> None:
        arguments, options = sort_arguments(type(self), others, _MODEL_ARGUMENTS, _AS_TRAINED)
        super().__init__(
            dim, in_dim, tuple(depths), tuple(window_size), tuple(num_heads), mlp_ratio,
            num_classes=0, global_pool="", layer_scale=layer_scale, **arguments,
        )  # fmt: skip
        self.norm = nn.Identity()
        self._set_up(out_indices, norm_layer, pretrained, **options)


_MODEL_ARGUMENTS = set(inspect.signature(MambaVision).parameters) - {"num_classes", "global_pool"}
_AS_TRAINED = "stochastic depth is 0.2, batch norms use batch statistics and nothing is frozen"
