"""VMamba: a vision backbone of two-dimensional selective scans (Liu et al. 2024, https://arxiv.org/abs/2401.10166).

Four stages at strides 4, 8, 16 and 32 of residual blocks: an SS2D mixer, and in all but the first generation
("vanilla") an MLP behind it.

Parameter names and numbers are those of the released checkpoints.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, GluMlp, LayerNorm2d, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from mambavision.models.build import build
from mambavision.models.layers import Activation, activation, check_choice, drop_path_rates
from mambavision.models.ss2d import NORM_EPS, SS2D, OutNorm, Routes, ScanInit
from mambavision.models.staged import Stage, StagedModel, init_linear

Norm = Literal["layer", "batch"]
Stem = Literal["overlapping", "patch"]
Downsample = Literal["conv3x3", "conv2x2", "merge"]

NormLayer = Callable[[int], nn.Module]

_layer_norm_2d = partial(LayerNorm2d, eps=NORM_EPS)

# Norms for channels-last and channels-first maps, by name.
_NORMS: dict[Norm, tuple[NormLayer, NormLayer]] = {
    "layer": (partial(nn.LayerNorm, eps=NORM_EPS), _layer_norm_2d),
    "batch": (nn.BatchNorm2d, nn.BatchNorm2d),
}


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm to (batch, height, width, channels).

    Batch norms are torch's own, on channels-first maps, so that programs can replace them by synchronised ones.
    """
    return norm(x) if isinstance(norm, nn.LayerNorm) else norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """(batch, dim, H, W) -> (batch, out_dim, H/2, W/2) rounded up: a linear layer on the four pixels of a square."""

    def __init__(self, dim: int, out_dim: int, norm: NormLayer) -> None:
        super().__init__()
        self.norm = norm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(_normalised(self.norm, torch.cat(corners, dim=-1))).permute(0, 3, 1, 2)


class VSSBlock(nn.Module):
    """Pre-norm residual block of a mixer and an MLP, both optional."""

    def __init__(
        self, dim: int, norm: NormLayer, mixer: nn.Module | None, mlp: nn.Module | None, drop_path: float
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.norm = nn.Identity() if mixer is None else norm(dim)
        self.op = mixer
        self.norm2 = nn.Identity() if mlp is None else norm(dim)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, dim) -> same shape."""
        if self.op is not None:
            x = x + self.drop_path(self.op(_normalised(self.norm, x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(_normalised(self.norm2, x)))
        return x


class VSSStage(Stage):
    """A stage of VSS blocks, which work on channels-last maps."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, H, W) -> same shape."""
        return self.run_blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Classifier(nn.Module):
    """Holder of the final norm and the classifier, which checkpoints keep under one name."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.head: nn.Module = nn.Identity()


class VMamba(StagedModel):
    """VMamba classifier and backbone.

    Args:
        dims: Width of the first stage, doubling with each stage; or the widths of all.
        depths: Blocks of each stage.
        ssm_d_state: States of the scan for each channel.
        ssm_ratio: Scanned channels relative to those of the block; 0 for blocks without a mixer.
        ssm_dt_rank: Rank of the step size's projection; "auto" for a sixteenth of the width, rounded up.
        ssm_act_layer: Activation before the scan.
        ssm_conv: Kernel size of the depthwise convolution before the scan; below 2 for none.
        ssm_conv_bias: Use a bias in that convolution.
        ssm_drop_rate: Dropout rate after the mixer.
        ssm_init: Initial parameters of the scan, see `SS2D`.
        routes: Routes of the scan, see `SS2D` for this and the next four arguments.
        gate: Multiply the result of the scan by a second projection.
        gate_act: Apply the activation to that projection.
        out_norm: Normalisation after the scan.
        out_act: Apply GELU after that.
        mlp_ratio: Hidden width of the MLPs relative to their input width; 0 for blocks without an MLP.
        mlp_act_layer: Activation of the MLPs.
        gmlp: MLPs with a gate.
        drop_rate: Dropout in the MLPs.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        norm: Normalisation of stem, blocks and downsampling: over the channels, or over the batch.
        patch_norm: Normalisation in the stem.
        stem: "overlapping": two strided 3x3 convolutions; "patch": one whose stride is its size.
        downsample: Between the stages: a strided convolution, or "merge" of four pixels in a linear layer.
        patch_size: Stride of the stem.
        pos_embed_size: Image size of the learned position embedding, for example (224, 224); it is resized for other
            images. None for no position embedding.
        in_chans: Channels of the images.
        num_classes: Classes; 0 gives pooled features instead of logits.
        global_pool: timm's pooling types: avg, max, avgmax, catavgmax, or an empty string for none.
        decay_scan: Apply weight decay to the scan's state matrices and step sizes. The original marks A_logs as exempt,
            but no optimizer reads the mark. False exempts both through `no_weight_decay`.
    """

    stages_name = "layers"
    layers: Any  # nn.ModuleList of `VSSStage`
    norm_names = ("classifier.norm",)

    def __init__(
        self,
        dims: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | Literal["auto"] = "auto",
        ssm_act_layer: Activation = "silu",
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        ssm_init: ScanInit = "mamba",
        routes: Routes = "cross",
        gate: bool = False,
        gate_act: bool = True,
        out_norm: OutNorm = "layer",
        out_act: bool = False,
        mlp_ratio: float = 4.0,
        mlp_act_layer: Activation = "gelu",
        gmlp: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm: Norm = "layer",
        patch_norm: bool = True,
        stem: Stem = "overlapping",
        downsample: Downsample = "conv3x3",
        patch_size: int = 4,
        pos_embed_size: tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        decay_scan: bool = True,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("norm", norm, Norm),
            ("stem", stem, Stem),
            ("downsample", downsample, Downsample),
            ("ssm_act_layer", ssm_act_layer, Activation),
            ("ssm_init", ssm_init, ScanInit),
            ("mlp_act_layer", mlp_act_layer, Activation),
        ):
            check_choice(name, value, choices)
        widths = [dims * 2**stage for stage in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(widths) != len(depths):
            raise ValueError(f"dims has {len(widths)} widths for the {len(depths)} stages of depths")
        self.in_chans = in_chans
        self.num_features = widths[-1]
        self.decay_scan = decay_scan
        norm_last, norm_first = _NORMS[norm]

        mixer = partial(
            SS2D,
            d_state=ssm_d_state,
            ratio=ssm_ratio,
            dt_rank=ssm_dt_rank,
            act_layer=ssm_act_layer,
            conv_size=ssm_conv,
            conv_bias=ssm_conv_bias,
            gate=gate,
            gate_act=gate_act,
            routes=routes,
            out_norm=out_norm,
            out_act=out_act,
            drop=ssm_drop_rate,
            init=ssm_init,
        )

        def block(width: int, drop_path: float) -> VSSBlock:
            mlp = _mlp(width, mlp_ratio, mlp_act_layer, gmlp, drop_rate) if mlp_ratio > 0 else None
            return VSSBlock(width, norm_last, mixer(width) if ssm_ratio > 0 else None, mlp, drop_path)

        stem_norm: NormLayer = norm_first if patch_norm else nn.Identity
        self.patch_embed = _stem(stem, in_chans, widths[0], patch_size, stem_norm)
        if pos_embed_size is None:
            self.pos_embed = None
        else:
            grid = [side // patch_size for side in pos_embed_size]
            self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, widths[0], *grid), std=0.02))
        drop_paths = drop_path_rates(drop_path_rate, depths)
        self.layers = nn.ModuleList()
        self.feature_info = []
        for stage, width in enumerate(widths):
            is_last = stage == len(widths) - 1
            down = (
                nn.Identity() if is_last else _downsample(downsample, width, widths[stage + 1], norm_last, norm_first)
            )
            self.layers.append(VSSStage([block(width, rate) for rate in drop_paths[stage]], down))
            self.feature_info.append(
                {"num_chs": width, "reduction": patch_size * 2**stage, "module": f"layers.{stage}"}
            )
        self.classifier = Classifier(norm_first(self.num_features))
        self._create_head(num_classes, global_pool)
        for module in self.modules():
            init_linear(module)

    def forward_stem(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> (batch, width, H/4, W/4), with the learned positions."""
        x = self.patch_embed(x)
        return x if self.pos_embed is None else x + _resized(self.pos_embed, x.shape[2:])

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> (batch, num_features, H/32, W/32), normalised."""
        x = self.forward_stem(x)
        for stage in self.layers:
            x = stage.downsample(stage(x))
        return self.classifier.norm(x)

    @property
    def stages(self) -> Any:
        return self.layers

    def final_norm(self, x: Tensor) -> Tensor:
        return self.classifier.norm(x)

    def get_classifier(self) -> nn.Module:
        return self.classifier.head

    def _set_classifier(self, head: nn.Module) -> None:
        self.classifier.head = head

    def _remove_norm(self) -> None:
        self.classifier.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to biases and other vectors."""
        exempt = ("pos_embed",) if self.decay_scan else ("pos_embed", "A_logs", "dt_projs_bias")
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {**super().group_matcher(coarse), "stem": r"^patch_embed|^pos_embed"}

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert weights from any layout of the original code to this model's names and shapes."""
        own = self.state_dict()
        renamed = _RENAMED + (_RENAMED_MERGING if "layers.0.downsample.norm.weight" in own else [])
        converted = {}
        for key, value in state_dict.items():
            for pattern, replacement in renamed:
                key = pattern.sub(replacement, key)
            if key in own and value.shape != own[key].shape:
                value = _fitted(key, value, own[key].shape)
            converted[key] = value
        return converted


def _patterns(renamed: dict[str, str]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in renamed.items()]


# Earlier names, and those of the single-file version.
_RENAMED = _patterns(
    {
        r"^patch_embed\.proj\.": "patch_embed.0.",
        r"^patch_embed\.norm\.": "patch_embed.2.",
        r"^norm\.": "classifier.norm.",
        r"^head\.": "classifier.head.",
        r"(\.blocks\.\d+)\.ln_1\.": r"\1.norm.",
        r"(\.blocks\.\d+)\.self_attention\.": r"\1.op.",
        r"\.op\.x_proj\.weight$": ".op.x_proj_weight",
        r"\.op\.dt_projs\.weight$": ".op.dt_projs_weight",
    }
)
# In the single-file version, the norm and the linear layer of merging have indices instead of names.
_RENAMED_MERGING = _patterns(
    {
        r"\.downsample\.1\.(weight|bias)$": r".downsample.norm.\1",
        r"\.downsample\.2\.weight$": ".downsample.reduction.weight",
    }
)


def _fitted(key: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Return a value in the model's shape, if the layouts differ only in notation."""
    if key == "pos_embed" and value.ndim == 4 and value.shape[1] == shape[1]:
        return _resized(value, shape[2:])
    is_convolution = value.ndim == 4 and len(shape) == 2  # 1x1, for a linear layer
    is_flat = value.ndim == 2 and key.endswith(("x_proj_weight", "dt_projs_weight"))
    return value.reshape(shape) if (is_convolution or is_flat) and value.numel() == shape.numel() else value


def _resized(pos_embed: Tensor, size: torch.Size) -> Tensor:
    if pos_embed.shape[2:] == size:
        return pos_embed
    return F.interpolate(pos_embed.float(), size, mode="bicubic").to(pos_embed.dtype)


def _mlp(dim: int, ratio: float, act_layer: Activation, gated: bool, drop: float) -> nn.Module:
    hidden, act = int(dim * ratio), activation(act_layer)
    if gated:
        return GluMlp(dim, 2 * hidden, act_layer=act, drop=drop, gate_last=True)
    return Mlp(dim, hidden, act_layer=act, drop=drop)


# In stem and downsampling, identities keep the indices of the other layers as in checkpoints.


def _stem(kind: Stem, in_chans: int, dim: int, stride: int, norm: NormLayer) -> nn.Sequential:
    if kind == "patch":
        return nn.Sequential(nn.Conv2d(in_chans, dim, stride, stride), nn.Identity(), norm(dim))
    stride //= 2
    conv = partial(nn.Conv2d, kernel_size=stride + 1, stride=stride, padding=1)
    first = conv(in_chans, dim // 2), nn.Identity(), norm(dim // 2), nn.Identity(), nn.GELU()
    return nn.Sequential(*first, conv(dim // 2, dim), nn.Identity(), norm(dim))


def _downsample(kind: Downsample, dim: int, out_dim: int, norm_last: NormLayer, norm_first: NormLayer) -> nn.Module:
    if kind == "merge":
        return PatchMerging(dim, out_dim, norm_last)
    size, padding = (3, 1) if kind == "conv3x3" else (2, 0)
    conv = nn.Conv2d(dim, out_dim, size, stride=2, padding=padding)
    return nn.Sequential(nn.Identity(), conv, nn.Identity(), norm_first(out_dim))


def _cfg(release: str, filename: str, **kwargs: Any) -> dict[str, Any]:
    return {
        # releases of the authors' repository; their names begin with a number sign
        "url": f"https://github.com/MzeroMiko/VMamba/releases/download/%23{release}/{filename}",
        "custom_load": True,
        "license": "MIT, (c) 2024 MzeroMiko: see https://github.com/MzeroMiko/VMamba",
        "paper_name": "VMamba: Visual State Space Model",
        "paper_ids": "arXiv:2401.10166",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0",
        "classifier": "classifier.head",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_s1l8.in1k": _cfg("v2cls", "vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_small_s1l20.in1k": _cfg("v2cls", "vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base_s1l20.in1k": _cfg("v2cls", "vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vmamba_tiny_s2l5.in1k": _cfg("v2cls", "vssm_tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_small_s2l15.in1k": _cfg("v2cls", "vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_base_s2l15.in1k": _cfg("v2cls", "vssm_base_0229_ckpt_epoch_237.pth"),
        "vanilla_vmamba_tiny.in1k": _cfg("v0cls", "vssmtiny_dp01_ckpt_epoch_292.pth"),
        "vanilla_vmamba_small.in1k": _cfg("v0cls", "vssmsmall_dp03_ckpt_epoch_238.pth"),
        "vanilla_vmamba_base.in1k": _cfg("v0cls", "vssmbase_dp06_ckpt_epoch_241.pth"),
    }
)

# Named after the ratio of scanned channels and the depth of the third stage.
_TINY_S1L8 = {
    "dims": 96,
    "depths": (2, 2, 8, 2),
    "ssm_d_state": 1,
    "ssm_ratio": 1.0,
    "ssm_conv_bias": False,
    "drop_path_rate": 0.2,
}
_SMALL_S1L20 = {**_TINY_S1L8, "depths": (2, 2, 20, 2), "drop_path_rate": 0.3}
_BASE_S1L20 = {**_SMALL_S1L20, "dims": 128, "drop_path_rate": 0.5}
_TINY_S2L5 = {**_TINY_S1L8, "depths": (2, 2, 5, 2), "ssm_ratio": 2.0}
_SMALL_S2L15 = {**_TINY_S2L5, "depths": (2, 2, 15, 2), "drop_path_rate": 0.3}
_BASE_S2L15 = {**_SMALL_S2L15, "dims": 128, "drop_path_rate": 0.6}
_VANILLA_TINY = {
    "dims": 96,
    "depths": (2, 2, 9, 2),
    "ssm_d_state": 16,
    "ssm_ratio": 2.0,
    "gate": True,
    "mlp_ratio": 0.0,
    "stem": "patch",
    "downsample": "merge",
    "drop_path_rate": 0.2,
}
_VANILLA_SMALL = {**_VANILLA_TINY, "depths": (2, 2, 27, 2), "drop_path_rate": 0.3}
_VANILLA_BASE = {**_VANILLA_SMALL, "dims": 128, "drop_path_rate": 0.6}


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Tiny, 30.2 M parameters; known as VMamba-T."""
    return build(VMamba, "vmamba_tiny_s1l8", pretrained, **{**_TINY_S1L8, **kwargs})


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Small, scanning as many channels as the block has, 49.0 M parameters."""
    return build(VMamba, "vmamba_small_s1l20", pretrained, **{**_SMALL_S1L20, **kwargs})


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Base, scanning as many channels as the block has, 86.6 M parameters."""
    return build(VMamba, "vmamba_base_s1l20", pretrained, **{**_BASE_S1L20, **kwargs})


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Tiny, scanning twice as many channels with fewer blocks, 30.7 M parameters."""
    return build(VMamba, "vmamba_tiny_s2l5", pretrained, **{**_TINY_S2L5, **kwargs})


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Small, 50.1 M parameters; known as VMamba-S."""
    return build(VMamba, "vmamba_small_s2l15", pretrained, **{**_SMALL_S2L15, **kwargs})


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Base, 88.6 M parameters; known as VMamba-B."""
    return build(VMamba, "vmamba_base_s2l15", pretrained, **{**_BASE_S2L15, **kwargs})


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Tiny of the first generation, 22.9 M parameters."""
    return build(VMamba, "vanilla_vmamba_tiny", pretrained, **{**_VANILLA_TINY, **kwargs})


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Small of the first generation, 44.4 M parameters."""
    return build(VMamba, "vanilla_vmamba_small", pretrained, **{**_VANILLA_SMALL, **kwargs})


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Base of the first generation, 76.3 M parameters."""
    return build(VMamba, "vanilla_vmamba_base", pretrained, **{**_VANILLA_BASE, **kwargs})
