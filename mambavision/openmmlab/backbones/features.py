"""Feature maps of this package's models as OpenMMLab backbones: the common base of all of them."""

import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import timm
from mmengine.runner import CheckpointLoader
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mambavision.checkpoint import EMA_KEYS, load_weights
from mambavision.errors import ArgumentError, CheckpointError
from mambavision.factory import create_model
from mambavision.text import nearest
from mambavision.timm_model import TimmModel

_logger = logging.getLogger(__name__)

OutNorm = Literal["ln2d", "ln", "bn"]
Self = TypeVar("Self", bound="FeatureMaps")

# Arguments that the original configs inherit from the ResNets and Swins of MMDetection's and MMSegmentation's bases,
# because they do not delete the inherited backbone. The original programs ignore unknown arguments.
_INHERITED = {
    "ResNet": {"depth", "num_stages", "frozen_stages", "norm_cfg", "norm_eval", "style", "init_cfg"},
    "SwinTransformer": {
        "embed_dims", "pretrain_img_size", "patch_size", "strides", "num_heads", "window_size", "qkv_bias", "qk_scale",
        "patch_norm", "drop_rate", "attn_drop_rate", "drop_path_rate", "use_abs_pos_embed", "act_cfg", "norm_cfg",
        "convert_weights", "frozen_stages", "with_cp", "init_cfg",
    },
}  # fmt: skip
OPTIONS = ("frozen_stages", "norm_eval", "with_cp", "init_cfg")
_LEFT_OUT = ("outnorm", "norm.", "head.", "classifier.")  # entries of checkpoints that a backbone does not need


class BackboneArgumentError(ArgumentError):
    """An argument that a backbone does not have, or an invalid value."""


class FeatureMaps(TimmModel):
    """Mix-in, in front of a model class with timm's interface, that makes the model an OpenMMLab backbone.

    Args:
        out_indices: Stages whose features are returned.
        norm_layer: Normalisation ``outnorm{i}`` of the features of stage i: "ln2d" or "ln" over the channels, "bn", or
            None for none.
        pretrained: Weights for `init_weights`, which training calls: a file or URL of a classifier or backbone, or the
            name of a registered model for its released weights. Classifier and final norm are not loaded.
        frozen_stages: Number of frozen stages, in addition to the stem; 0 freezes the stem only, -1 nothing.
        norm_eval: Keep the statistics of batch norms fixed in training.
        with_cp: Recompute activations in the backward pass instead of storing them.
        init_cfg: OpenMMLab's form of `pretrained`: ``dict(type="Pretrained", checkpoint=...)``.
    """

    prefers_ema = False  # load the averaged weights of a pretrained file, if it has any

    @property
    def trunk(self) -> TimmModel:
        """The model that computes the features."""
        return self

    def _set_up(
        self,
        out_indices: Sequence[int],
        norm_layer: OutNorm | None,
        pretrained: str | None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        stages = self.trunk.feature_info
        chosen = [index for index in range(len(stages)) if isinstance(out_indices, Sequence) and index in out_indices]
        if not isinstance(out_indices, Sequence) or chosen != list(out_indices):
            raise BackboneArgumentError(
                f"out_indices must list stages from 0 to {len(stages) - 1} in ascending order, got {out_indices}"
            )
        if not -1 <= frozen_stages <= len(stages):
            raise BackboneArgumentError(f"frozen_stages must be from -1 to {len(stages)}, got {frozen_stages}")
        layer_norm = partial(LayerNorm2d, eps=1e-5)
        norms: dict[OutNorm | None, Callable[[int], nn.Module]] = {
            "ln2d": layer_norm,
            "ln": layer_norm,
            "bn": nn.BatchNorm2d,
            None: nn.Identity,
        }
        if norm_layer not in norms:
            raise BackboneArgumentError(f"norm_layer must be one of {', '.join(map(str, norms))}, got {norm_layer!r}")
        self.out_indices = tuple(out_indices)
        self.norm_eval = norm_eval
        self.pretrained = _pretrained(pretrained, init_cfg)
        for index in self.out_indices:
            self.add_module(f"outnorm{index}", norms[norm_layer](stages[index]["num_chs"]))
        if with_cp:
            self.trunk.set_grad_checkpointing(True)
        self._frozen = self._freeze(frozen_stages)

    def _freeze(self, stages: int) -> list[nn.Module]:
        """Freeze the stem and the first stages; return the modules that are completely frozen."""
        if stages < 0:
            return []
        groups = group_parameters(self.trunk, self.trunk.group_matcher(coarse=True))
        for name in (name for group in range(stages + 1) for name in groups[group]):
            self.trunk.get_parameter(name).requires_grad_(False)
        for index in self.out_indices:
            if index < stages:
                self.get_submodule(f"outnorm{index}").requires_grad_(False)
        return [module for module in self.modules() if module is not self and _is_frozen(module)]

    def forward(self, x: Tensor) -> Any:
        """(batch, channels, H, W) -> a list of the maps (batch, width, H / stride, W / stride) of `out_indices`.

        Without `out_indices`, the final map alone.
        """
        if not self.out_indices:
            return self.trunk.forward_features(x)
        maps = self.trunk.forward_intermediates(x, indices=list(self.out_indices), intermediates_only=True)
        return [
            getattr(self, f"outnorm{index}")(features).contiguous()
            for index, features in zip(self.out_indices, maps, strict=True)
        ]

    def train(self: Self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._frozen:
            module.train(False)
        if self.norm_eval:
            for module in self.trunk.modules():
                if isinstance(module, _BatchNorm):
                    module.train(False)
        return self

    def init_weights(self) -> None:
        """Load the pretrained weights; mmengine calls this before training."""
        if not self.pretrained:  # empty in VMamba's configs, to be set on the command line
            _logger.warning(
                "the backbone has no pretrained weights: unless a checkpoint is loaded, it starts untrained; for those "
                "of a classifier, set model.backbone.pretrained to its file"
            )
            return
        if timm.is_model(self.pretrained):
            checkpoint = create_model(self.pretrained, pretrained=True).state_dict()
        else:
            checkpoint = CheckpointLoader.load_checkpoint(self.pretrained, map_location="cpu")
        ema = self.prefers_ema and any(key in checkpoint for key in EMA_KEYS)
        report = load_weights(self.trunk, checkpoint, self.pretrained, strict=False, ema=ema)
        missing = [key for key in report.missing if not key.startswith("outnorm")]
        unexpected = [key for key in report.unexpected if not key.startswith(_LEFT_OUT)]
        if missing or unexpected or report.reshaped:
            raise CheckpointError(f"{self.pretrained}: belongs to another model than the backbone: {report}.")
        kind = "averaged (EMA) " if ema else ""
        _logger.info("the backbone starts from the %sweights of %s: %s", kind, self.pretrained, report)


def _pretrained(pretrained: str | None, init_cfg: dict[str, Any] | None) -> str | None:
    if init_cfg is None:
        return pretrained
    if pretrained is not None or init_cfg.get("type") != "Pretrained" or "checkpoint" not in init_cfg:
        raise BackboneArgumentError(
            f"init_cfg must be dict(type='Pretrained', checkpoint=...) without pretrained, got {init_cfg}"
        )
    return init_cfg["checkpoint"]


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def sort_arguments(
    backbone: type[FeatureMaps],
    given: Mapping[str, Any],
    own: Collection[str],
    consequence: str,
    survivors: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those of a backbone's model and the options of `FeatureMaps`.

    Arguments of a ResNet or Swin that the config inherits without deleting it are dropped, with a log message.

    Args:
        backbone: The class, for its name and parameters in messages.
        given: Keyword arguments that are not parameters of the backbone.
        own: Names of the model's arguments.
        consequence: Effect of dropping inherited arguments, for the log.
        survivors: Arguments that are kept even if they are inherited.

    Raises:
        BackboneArgumentError: An argument is unknown; names the nearest one.
    """
    base = "ResNet" if "depth" in given else "SwinTransformer" if "embed_dims" in given else None
    if base is not None:
        ignored = (_INHERITED[base] | {"drop_path_rate"}).difference(survivors)
        _logger.warning(
            "the config inherits a %s backbone without _delete_=True, like the original configs; as there, these "
            "arguments have no effect: %s; %s",
            base,
            ", ".join(f"{key}={value}" for key, value in given.items() if key in ignored),
            consequence,
        )
        given = {key: value for key, value in given.items() if key not in ignored}
    for name in given:
        if name not in own and name not in OPTIONS:
            known = [*inspect.signature(backbone).parameters, *OPTIONS, *own]
            raise BackboneArgumentError(f"{backbone.__name__} has no argument {name!r}.{nearest(name, known)}")
    options = {name: given[name] for name in OPTIONS if name in given}
    return {name: value for name, value in given.items() if name not in options}, options
