"""SegMAN's encoders under the original's names, as backbones of OpenMMLab configs."""

import inspect
import logging
from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS

from mambavision.models.segman import VARIANTS, SegMANEncoder
from mambavision.openmmlab.backbones.features import BackboneArgumentError, FeatureMaps
from mambavision.text import nearest

_logger = logging.getLogger(__name__)

_OWN = {"num_classes", "global_pool", "projection"}  # of the classifier
_MODEL_ARGUMENTS = set(inspect.signature(SegMANEncoder).parameters) - _OWN
# Arguments that the original accepts without effect on a backbone.
_INERT = {"image_size", "num_classes", "projection", "drop_rate", "sr_ratio", "style"}


class SegMANBackbone(FeatureMaps, SegMANEncoder):
    """An encoder without its classifier; returns the features of the stages without further norms.

    Args:
        out_indices: Stages whose features are returned.
        pretrained: See `FeatureMaps`. Averaged weights in the file (``state_dict_ema``) are preferred.
        use_checkpoint: Number of blocks of each stage whose activations are recomputed in the backward pass, as in the
            original; any number but 0 means all, like ``with_cp=True``.
        frozen_stages, norm_eval, with_cp, init_cfg: See `FeatureMaps`.
        others: Arguments of `SegMANEncoder` that override the variant's. Arguments that the original accepts without
            effect (``image_size``, ``style``, ...) are ignored, with a log message.
    """

    variant: str  # among VARIANTS
    prefers_ema = True

    def __init__(
        self,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        use_checkpoint: Sequence[int] = (0, 0, 0, 0),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        model = {name: value for name, value in others.items() if name in _MODEL_ARGUMENTS}
        ignored = {name: value for name, value in others.items() if name in _INERT}
        for name in others:
            if name not in model and name not in ignored:
                known = [*inspect.signature(SegMANBackbone).parameters, *_MODEL_ARGUMENTS, *_INERT]
                raise BackboneArgumentError(f"{type(self).__name__} has no argument {name!r}.{nearest(name, known)}")
        if ignored:
            _logger.info("%s: these arguments have no effect: %s", type(self).__name__, ", ".join(ignored))
        super().__init__(**{**VARIANTS[self.variant], **model}, num_classes=0, global_pool="")
        self.prune_intermediate_layers(len(self.stages), prune_norm=True)
        with_cp = with_cp or any(use_checkpoint)
        self._set_up(out_indices, None, pretrained, frozen_stages, norm_eval, with_cp, init_cfg)


@MODELS.register_module()
class SegMANEncoder_t(SegMANBackbone):  # noqa: N801
    variant = "t"


@MODELS.register_module()
class SegMANEncoder_s(SegMANBackbone):  # noqa: N801
    variant = "s"


@MODELS.register_module()
class SegMANEncoder_b(SegMANBackbone):  # noqa: N801
    variant = "b"


@MODELS.register_module()
class SegMANEncoder_l(SegMANBackbone):  # noqa: N801
    variant = "l"


@MODELS.register_module()
class SegMANEncoder_l2(SegMANBackbone):  # noqa: N801
    variant = "l2"
