"""VMamba as an OpenMMLab backbone, with the arguments of the original's."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from mambavision.models import VMamba
from mambavision.openmmlab.backbones.features import BackboneArgumentError, FeatureMaps, OutNorm, sort_arguments
from mambavision.text import nearest

# Keywords with the same meaning in both.
_COMMON = {
    "patch_size", "in_chans", "depths", "dims", "ssm_d_state", "ssm_ratio", "ssm_dt_rank", "ssm_act_layer", "ssm_conv",
    "ssm_conv_bias", "ssm_drop_rate", "mlp_ratio", "mlp_act_layer", "gmlp", "patch_norm", "drop_path_rate",
}  # fmt: skip
# The original's keyword: its default, the argument here, and this argument's values by those of the original.
_CHOICES = {
    "ssm_init": ("v0", "ssm_init", {"v0": "mamba", "v1": "normal", "v2": "uniform"}),
    "norm_layer": ("ln", "norm", {"ln": "layer", "ln2d": "layer", "bn": "batch"}),
    "downsample_version": ("v2", "downsample", {"v1": "merge", "v2": "conv2x2", "v3": "conv3x3"}),
    "patchembed_version": ("v1", "stem", {"v1": "patch", "v2": "overlapping"}),
}
# Without effect in the original, too: the first is never read, the second belongs to the classifier.
_UNUSED = {"ssm_rank_ratio", "num_classes"}
KEYWORDS = {*_COMMON, *_CHOICES, *_UNUSED, "mlp_drop_rate", "posembed", "imgsize", "forward_type"}

# The first part of a forward type. Cores with the same routes differ in backend and precision, which are chosen
# elsewhere here.
_ROUTES = {
    **dict.fromkeys(("v0", "v0seq", "v01", "v02", "v03", "v04", "v05", "v2", "v3"), "cross"),
    "v051d": "unidirectional",
    "v052d": "bidirectional",
    "v052dc": "cascade",
}
_VANILLA = ("v0", "v0seq")
_POSTFIXES: dict[str, dict[str, Any]] = {
    "_noz": {"gate": False},
    "_nozact": {"gate_act": False},
    "_oact": {"out_act": True},
    "_onnone": {"out_norm": "none"},
    "_ondwconv3": {"out_norm": "depthwise"},
    "_oncnorm": {"out_norm": "layer_depthwise"},
    "_onsoftmax": {"out_norm": "softmax"},
    "_onsigmoid": {"out_norm": "sigmoid"},
    "_no32": {},  # about precision
}


def scan_arguments(forward_type: str) -> dict[str, Any]:
    """Return the arguments of `VMamba` for a forward type.

    Args:
        forward_type: A core and postfixes, as in "v05_onnone_noz". The original accepts the postfixes in one
            order only; here any order works. The cores v0 and v0seq include gate, SiLU and bias, and take no postfixes.

    Raises:
        BackboneArgumentError: There is no such core or postfix, or postfixes contradict each other.
    """

    def refused(reason: str) -> BackboneArgumentError:
        return BackboneArgumentError(f"forward_type {forward_type!r}: {reason}")

    core, *words = str(forward_type).split("_")
    if core not in _ROUTES:
        raise refused(f"{core!r} is none of {', '.join(_ROUTES)}.{nearest(core, _ROUTES)}")
    arguments: dict[str, Any] = {"routes": _ROUTES[core], "gate": True}
    if core in _VANILLA:
        if words:
            raise refused(f"{core} takes no postfixes; v05 is the same scan and takes them.")
        arguments |= {"ssm_act_layer": "silu", "ssm_conv_bias": True}
    for postfix in (f"_{word}" for word in words):
        if postfix not in _POSTFIXES:
            raise refused(f"there is no postfix {postfix!r}.{nearest(postfix, _POSTFIXES)}")
        if "out_norm" in _POSTFIXES[postfix].keys() & arguments.keys():
            raise refused("names two output norms; leave one out.")
        arguments.update(_POSTFIXES[postfix])
    return arguments


def vmamba_arguments(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Translate keywords of the original to arguments of `VMamba`.

    Args:
        keywords: Any of `KEYWORDS`; missing ones have the original's defaults.

    Raises:
        BackboneArgumentError: The original has no such value.
    """
    arguments = {name: value for name, value in keywords.items() if name in _COMMON}
    arguments |= scan_arguments(keywords.get("forward_type", "v2"))
    for keyword, (default, argument, values) in _CHOICES.items():
        value = keywords.get(keyword, default)
        if value not in values:
            raise BackboneArgumentError(f"{keyword} must be one of {', '.join(values)}, got {value!r}")
        arguments[argument] = values[value]
    if "mlp_drop_rate" in keywords:
        arguments["drop_rate"] = keywords["mlp_drop_rate"]
    if keywords.get("posembed"):
        arguments["pos_embed_size"] = (keywords.get("imgsize", 224),) * 2
    return arguments


@MODELS.register_module()
class MM_VSSM(FeatureMaps, VMamba):  # noqa: N801
    """VMamba under the original's name, with its arguments and its parameter names.

    Takes the arguments of `FeatureMaps` (`norm_layer` also applies inside the model), ``use_checkpoint`` as the
    original's name for ``with_cp``, and `KEYWORDS`. Other arguments of a backbone that a config inherits without
    deleting it, like the original configs, are ignored. Unlike in the original, learned positions are added, resized to
    the image.
    """

    def __init__(
        self,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        norm_layer: OutNorm = "ln",
        use_checkpoint: bool = False,
        **others: Any,
    ) -> None:
        consequence = "nothing is frozen, and weights come from pretrained alone"
        keywords, options = sort_arguments(type(self), others, KEYWORDS, consequence, survivors=KEYWORDS)
        try:
            super().__init__(**vmamba_arguments({**keywords, "norm_layer": norm_layer}), num_classes=0, global_pool="")
        except ValueError as error:
            raise BackboneArgumentError(f"MM_VSSM: {error}") from error
        self.classifier.norm = nn.Identity()
        options["with_cp"] = options.get("with_cp", False) or use_checkpoint
        self._set_up(out_indices, norm_layer, pretrained, **options)
