"""Any registered model as an OpenMMLab backbone."""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS

from mambavision.factory import create_model
from mambavision.openmmlab.backbones.features import OPTIONS, FeatureMaps, OutNorm
from mambavision.timm_model import TimmModel


@MODELS.register_module()
class RegisteredBackbone(FeatureMaps):
    """Any model of this package, or of timm, as a backbone: ``dict(type="RegisteredBackbone", name="mamba_vision_T")``.

    Args:
        name: Registered name, as for `mambavision.create_model`.
        pretrained: See `FeatureMaps`; True for the released weights of `name`.
        others: Options of `FeatureMaps`; all others are arguments of the model, for example ``drop_path_rate``.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | bool | None = None,
        norm_layer: OutNorm | None = "ln2d",
        **others: Any,
    ) -> None:
        super().__init__()
        options = {key: others.pop(key) for key in OPTIONS if key in others}
        self.model = create_model(name, num_classes=0, **others)
        self.model.prune_intermediate_layers(list(out_indices), prune_norm=True, prune_head=True)
        self._set_up(out_indices, norm_layer, name if pretrained is True else pretrained or None, **options)

    @property
    def trunk(self) -> TimmModel:
        return self.model
