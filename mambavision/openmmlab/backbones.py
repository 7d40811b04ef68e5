"""The backbones that OpenMMLab configs name, on top of this package's models."""

import inspect
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import timm
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mambavision.checkpoint import load_weights
from mambavision.errors import CheckpointError, UserError, nearest
from mambavision.factory import create_model
from mambavision.models import MambaVision

_logger = logging.getLogger(__name__)

OutNorm = Literal["ln2d", "ln", "bn"]

# What the original's configs inherit from the ResNet of MMDetection's and the Swin of MMSegmentation's bases, whose
# backbone they do not delete. The original ignores all of it, and drop_path_rate.
_INHERITED = {
    "ResNet": {"depth", "num_stages", "frozen_stages", "norm_cfg", "norm_eval", "style", "init_cfg"},
    "SwinTransformer": {
        "embed_dims", "pretrain_img_size", "patch_size", "strides", "qkv_bias", "qk_scale", "patch_norm", "drop_rate",
        "attn_drop_rate", "use_abs_pos_embed", "act_cfg", "norm_cfg", "frozen_stages", "with_cp", "init_cfg",
    },
}  # fmt: skip


class BackboneArgumentError(UserError, ValueError):
    """A backbone has no such argument, or not with this value."""


class FeatureMaps:
    """What makes an OpenMMLab backbone of a model with timm's interface: a mix-in in front of the model's class.

    Args:
        out_indices: Stages whose features are returned.
        norm_layer: Normalisation ``outnorm{i}`` of the features of stage i: "ln2d" or "ln" over the channels, "bn".
        pretrained: Weights for `init_weights`, which training calls: a file or URL of a classifier or backbone, or the
            name of a registered model, whose released weights are taken; classifier and final norm are left out.
        frozen_stages: Stages that are not trained, the stem included; 0 for the stem alone, -1 for none.
        norm_eval: Batch norms keep their statistics in training.
        with_cp: Recompute activations in the backward pass instead of keeping them.
        init_cfg: OpenMMLab's way to say `pretrained`: ``dict(type="Pretrained", checkpoint=...)``.
    """

    @property
    def trunk(self) -> nn.Module:
        """The model that computes the features."""
        return self

    def _set_up(
        self,
        out_indices: Sequence[int],
        norm_layer: OutNorm,
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
        norms = {"ln2d": layer_norm, "ln": layer_norm, "bn": nn.BatchNorm2d}
        if norm_layer not in norms:
            raise BackboneArgumentError(f"norm_layer must be one of {', '.join(norms)}, got {norm_layer!r}")
        self.out_indices = tuple(out_indices)
        self.norm_eval = norm_eval
        self.pretrained = _pretrained(pretrained, init_cfg)
        for index in self.out_indices:
            self.add_module(f"outnorm{index}", norms[norm_layer](stages[index]["num_chs"]))
        if with_cp:
            self.trunk.set_grad_checkpointing(True)
        self._frozen = self._freeze(frozen_stages)

    def _freeze(self, stages: int) -> list[nn.Module]:
        """Freeze the stem and the first stages; return the modules inside that hold nothing else."""
        if stages < 0:
            return []
        groups = group_parameters(self.trunk, self.trunk.group_matcher(coarse=True))
        for name in (name for group in range(stages + 1) for name in groups[group]):
            self.trunk.get_parameter(name).requires_grad_(False)
        for index in self.out_indices:
            if index < stages:
                self.get_submodule(f"outnorm{index}").requires_grad_(False)
        return [module for module in self.modules() if module is not self and _is_frozen(module)]

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        """(batch, channels, H, W) -> a (batch, width, H / stride, W / stride) map of each stage of `out_indices`."""
        if not self.out_indices:
            return self.trunk.forward_features(x)
        maps = self.trunk.forward_intermediates(x, indices=list(self.out_indices), intermediates_only=True)
        return [
            getattr(self, f"outnorm{index}")(features).contiguous()
            for index, features in zip(self.out_indices, maps, strict=True)
        ]

    def train(self, mode: bool = True) -> "FeatureMaps":
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
        if self.pretrained is None:
            return
        if timm.is_model(self.pretrained):
            checkpoint = create_model(self.pretrained, pretrained=True).state_dict()
        else:
            checkpoint = CheckpointLoader.load_checkpoint(self.pretrained, map_location="cpu")
        report = load_weights(self.trunk, checkpoint, self.pretrained, strict=False)
        missing = [key for key in report.missing if not key.startswith("outnorm")]
        unexpected = [key for key in report.unexpected if not key.startswith(("outnorm", "norm.", "head."))]
        if missing or unexpected or report.reshaped:
            raise CheckpointError(f"{self.pretrained}: is of another model than the backbone: {report}.")


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


@MODELS.register_module()
class MM_mamba_vision(FeatureMaps, MambaVision):  # noqa: N801
    """MambaVision under the original's name, with its arguments and its parameter names.

    Takes the arguments of `FeatureMaps` and of `mambavision.models.MambaVision`. A config that inherits a ResNet or
    Swin backbone without deleting it, as the original's do, is understood as the original understands it: inherited
    arguments are ignored and `drop_path_rate` is 0.2 whatever the config says.
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
        others = _without_inherited(others)
        options = {name: others.pop(name) for name in _OPTIONS if name in others}
        for name in others:
            if name not in _MODEL_ARGUMENTS:
                known = [*inspect.signature(MM_mamba_vision).parameters, *_OPTIONS, *_MODEL_ARGUMENTS]
                raise BackboneArgumentError(f"MM_mamba_vision has no argument {name!r}.{nearest(name, known)}")
        super().__init__(
            dim, in_dim, tuple(depths), tuple(window_size), tuple(num_heads), mlp_ratio,
            num_classes=0, global_pool="", layer_scale=layer_scale, **others,
        )  # fmt: skip
        self.norm = nn.Identity()
        self._set_up(out_indices, norm_layer, pretrained, **options)


_OPTIONS = ("frozen_stages", "norm_eval", "with_cp", "init_cfg")
_MODEL_ARGUMENTS = set(inspect.signature(MambaVision).parameters) - {"num_classes", "global_pool"}


def _without_inherited(arguments: dict[str, Any]) -> dict[str, Any]:
    base = "ResNet" if "depth" in arguments else "SwinTransformer" if "embed_dims" in arguments else None
    if base is None:
        return arguments
    ignored = _INHERITED[base] | {"drop_path_rate"}
    _logger.warning(
        "the config inherits a %s backbone without _delete_=True, as the original's do: as there, these arguments "
        "have no effect: %s; stochastic depth is 0.2, batch norms use batch statistics and nothing is frozen",
        base,
        ", ".join(f"{key}={value}" for key, value in arguments.items() if key in ignored),
    )
    return {key: value for key, value in arguments.items() if key not in ignored}


@MODELS.register_module()
class RegisteredBackbone(FeatureMaps, nn.Module):
    """Any model of this package, or of timm, as a backbone: ``dict(type="RegisteredBackbone", name="mamba_vision_T")``.

    Args:
        name: Registered name, as for `mambavision.create_model`.
        pretrained: As for `FeatureMaps`; True stands for `name`, its released weights.
        others: Options of `FeatureMaps`; anything else goes to the model, for example ``drop_path_rate``.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | bool | None = None,
        norm_layer: OutNorm = "ln2d",
        **others: Any,
    ) -> None:
        super().__init__()
        options = {key: others.pop(key) for key in _OPTIONS if key in others}
        self.model = create_model(name, num_classes=0, **others)
        self.model.prune_intermediate_layers(list(out_indices), prune_norm=True, prune_head=True)
        self._set_up(out_indices, norm_layer, name if pretrained is True else pretrained or None, **options)

    @property
    def trunk(self) -> nn.Module:
        return self.model
