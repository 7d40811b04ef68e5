"""MambaVision: a hybrid Mamba-Transformer vision backbone (Hatamizadeh and Kautz 2024, https://arxiv.org/abs/2407.08083).

Four stages at strides 4, 8, 16 and 32. The first two are residual convolutions; in the other two the map is cut into
square windows whose tokens pass through blocks with a Mamba mixer (first half of the stage) or attention (second half).

Parameter names and numbers are those of the released checkpoints.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from mambavision.models.build import build
from mambavision.models.layers import (
    InnerLinear,
    check_choice,
    drop_path_rates,
    init_dt_bias_,
    is_plain,
    window_partition,
    window_reverse,
)
from mambavision.models.staged import Stage, StagedModel, init_linear
from vision_kernels.mamba_mixer import compose_mixer, mamba_mixer

DtInit = Literal["published", "mamba"]


class PatchEmbed(nn.Module):
    """Stem: two strided convolutions, (batch, in_chans, H, W) -> (batch, dim, H/4, W/4) rounded up."""

    def __init__(self, in_chans: int, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_chans, in_dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(in_dim, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(dim, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_down(x)


class Downsample(nn.Module):
    """(batch, dim, H, W) -> (batch, 2 dim, H/2, W/2) rounded up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x)


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, dim: int, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.act1 = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.gamma = None if layer_scale is None else nn.Parameter(layer_scale * torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act1(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        if self.gamma is not None:
            branch = branch * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(branch)


class MambaVisionMixer(nn.Module):
    """Mamba mixer with two branches of dim / 2 channels, one of which is scanned.

    Unlike in Mamba, the convolutions are not causal, and the branches are concatenated instead of multiplied. The bias
    of `dt_proj` enters the step size twice, softplus(W dt + 2 bias), because the released weights were trained so.
    """

    def __init__(self, dim: int, d_state: int = 8, d_conv: int = 3) -> None:
        super().__init__()
        inner = dim // 2
        self.dt_rank = math.ceil(dim / 16)
        self.d_state = d_state
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.x_proj = InnerLinear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = InnerLinear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = nn.Conv1d(inner, inner, d_conv, padding="same", groups=inner, bias=False)
        self.conv1d_z = nn.Conv1d(inner, inner, d_conv, padding="same", groups=inner, bias=False)

    def init_dt(self) -> None:
        """Initialise the step size as Mamba does."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        init_dt_bias_(self.dt_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch x windows, tokens, dim) -> same shape."""
        # Both branches stay in one tensor, (..., x | z), and both convolutions are one.
        weight = torch.cat([self.conv1d_x.weight, self.conv1d_z.weight]).squeeze(1)
        xz = self.in_proj(x)
        # Always in float32, even for float64 models, as in the original.
        A, D, delta_bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_proj.bias.float()
        if is_plain(self.x_proj) and is_plain(self.dt_proj):
            weights = (self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias)
            yz = mamba_mixer(xz, weight, *weights, A, D, delta_bias)
        else:
            yz = compose_mixer(xz, weight, self.x_proj, self.dt_proj, A, D, delta_bias)
        return self.out_proj(yz)


class TokenBlock(nn.Module):
    """Pre-norm residual block of a mixer (Mamba or attention) and an MLP, on windows of tokens."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        drop_path_per_image: bool,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)
        self.drop_path_per_image = drop_path_per_image
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.gamma_1 = None if layer_scale is None else nn.Parameter(layer_scale * torch.ones(dim))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x: Tensor, windows_per_image: int) -> Tensor:
        """(batch x windows, tokens, dim) -> same shape."""
        x = x + self._drop_path(_scaled(self.mixer(self.norm1(x)), self.gamma_1), windows_per_image)
        return x + self._drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma_2), windows_per_image)

    def _drop_path(self, branch: Tensor, windows_per_image: int) -> Tensor:
        if not self.drop_path_per_image:
            return self.drop_path(branch)
        return self.drop_path(branch.unflatten(0, (-1, windows_per_image))).flatten(0, 1)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class Level(Stage):
    """A stage of convolution blocks, or of token blocks on windows."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module, window: int | None) -> None:
        super().__init__(blocks, downsample)
        self.window = window  # None for convolution blocks, which take the whole map

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, H, W) -> same shape."""
        if self.window is None:
            return self.run_blocks(x)
        height, width = x.shape[-2:]
        pad_bottom, pad_right = -height % self.window, -width % self.window
        if pad_bottom or pad_right:
            # The original does not mask the padding, which takes part in scan and attention.
            x = F.pad(x, (0, pad_right, 0, pad_bottom))
        padded_height, padded_width = height + pad_bottom, width + pad_right
        windows_per_image = (padded_height // self.window) * (padded_width // self.window)
        tokens = self.run_blocks(window_partition(x, self.window), windows_per_image)
        return window_reverse(tokens, self.window, padded_height, padded_width)[:, :, :height, :width]


class MambaVision(StagedModel):
    """MambaVision classifier and backbone.

    The defaults of the last three arguments reproduce the training of the published weights, which differs from what
    the original code declares; inference does not depend on them.

    Args:
        dim: Width of the first stage; it doubles with each stage.
        in_dim: Width inside the stem.
        depths: Blocks of each stage.
        window_size: Side of the token windows of each stage; not used in the first two.
        num_heads: Attention heads of each stage; not used in the first two.
        mlp_ratio: Hidden width of the MLPs relative to their input width.
        in_chans: Channels of the images.
        num_classes: Classes; 0 gives pooled features instead of logits.
        global_pool: timm's pooling types: avg, max, avgmax, catavgmax, or an empty string for none.
        qkv_bias: Bias in the query, key and value projections.
        qk_norm: LayerNorm on queries and keys (off in all released models).
        drop_rate: Dropout in the MLPs and after the attention projection.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        layer_scale: Initial scale of the branches of token blocks; None for no scale.
        layer_scale_conv: The same for convolution blocks.
        dt_init: Initial step size of the scan. "published": small random weights and zero bias, as the original uses in
            effect: its generic initialisation overwrites the Mamba-specific one. "mamba": the Mamba-specific one.
        decay_A_log: Apply weight decay to A_log. The original marks A_log as exempt, but no optimizer reads the mark.
            False exempts it through `no_weight_decay`.
        drop_path_per_image: Stochastic depth drops whole images, as usual, instead of single windows.
    """

    stages_name = "levels"
    levels: Any  # nn.ModuleList of `Level`
    norm_names = ("norm",)

    def __init__(
        self,
        dim: int,
        in_dim: int,
        depths: Sequence[int],
        window_size: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        qkv_bias: bool = True,
        qk_norm: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        dt_init: DtInit = "published",
        decay_A_log: bool = True,
        drop_path_per_image: bool = False,
    ) -> None:
        super().__init__()
        check_choice("dt_init", dt_init, DtInit)
        self.in_chans = in_chans
        self.num_features = dim * 8
        self.decay_A_log = decay_A_log

        drop_paths = drop_path_rates(drop_path_rate, depths)

        def token_block(stage: int, index: int) -> TokenBlock:
            width = dim * 2**stage
            # The first ceil(depth / 2) blocks are Mamba mixers.
            mixer: nn.Module
            if index < (depths[stage] + 1) // 2:
                mixer = MambaVisionMixer(width)
            else:
                mixer = Attention(
                    width,
                    num_heads[stage],
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    norm_layer=nn.LayerNorm,
                    attn_drop=attn_drop_rate,
                    proj_drop=drop_rate,
                )
            rate = drop_paths[stage][index]
            return TokenBlock(width, mixer, mlp_ratio, drop_rate, rate, drop_path_per_image, layer_scale)

        self.patch_embed = PatchEmbed(in_chans, in_dim, dim)
        self.levels = nn.ModuleList()
        self.feature_info = []
        for stage, depth in enumerate(depths):
            width = dim * 2**stage
            blocks: list[nn.Module]
            if stage < 2:
                blocks = [ConvBlock(width, drop_paths[stage][index], layer_scale_conv) for index in range(depth)]
            else:
                blocks = [token_block(stage, index) for index in range(depth)]
            downsample = Downsample(width) if stage < 3 else nn.Identity()
            self.levels.append(Level(blocks, downsample, window_size[stage] if stage >= 2 else None))
            self.feature_info.append({"num_chs": width, "reduction": 4 * 2**stage, "module": f"levels.{stage}"})
        self.norm: nn.Module = nn.BatchNorm2d(self.num_features)
        self._create_head(num_classes, global_pool)
        self._init_weights(dt_init)

    def _init_weights(self, dt_init: DtInit) -> None:
        for module in self.modules():
            init_linear(module)
        if dt_init == "mamba":
            for module in self.modules():
                if isinstance(module, MambaVisionMixer):
                    module.init_dt()

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> (batch, num_features, H/32, W/32), normalised."""
        x = self.patch_embed(x)
        for level in self.levels:
            x = level.downsample(level(x))
        return self.norm(x)

    @property
    def stages(self) -> Any:
        return self.levels

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def get_classifier(self) -> nn.Module:
        return self.head

    def _set_classifier(self, head: nn.Module) -> None:
        self.head = head

    def _remove_norm(self) -> None:
        self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to biases and other vectors."""
        return set() if self.decay_A_log else {name for name, _ in self.named_parameters() if name.endswith("A_log")}


def _cfg(repository: str, filename: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": f"nvidia/{repository}",
        "hf_hub_filename": filename,
        "custom_load": "hf",
        "license": f"NVIDIA, non-commercial use: see https://huggingface.co/nvidia/{repository}",
        "paper_name": "MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
        "paper_ids": "arXiv:2407.08083",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv_down.0",
        "classifier": "head",
        **kwargs,
    }


_AT_256 = {"input_size": (3, 256, 256), "pool_size": (8, 8)}
_AT_512 = {"input_size": (3, 512, 512), "pool_size": (16, 16), "crop_pct": 0.93, "crop_mode": "squash"}

default_cfgs = generate_default_cfgs(
    {
        "mamba_vision_T.in1k": _cfg("MambaVision-T-1K", "mambavision_tiny_1k.pth.tar"),
        "mamba_vision_T2.in1k": _cfg("MambaVision-T2-1K", "mambavision_tiny2_1k.pth.tar", crop_pct=0.98),
        "mamba_vision_S.in1k": _cfg("MambaVision-S-1K", "mambavision_small_1k.pth.tar", crop_pct=0.93),
        "mamba_vision_B.in1k": _cfg("MambaVision-B-1K", "mambavision_base_1k.pth.tar"),
        "mamba_vision_B_21k.in21k_ft_in1k": _cfg("MambaVision-B-21K", "mambavision_base_21k.pth.tar"),
        "mamba_vision_L.in1k": _cfg("MambaVision-L-1K", "mambavision_large_1k.pth.tar"),
        "mamba_vision_L_21k.in21k_ft_in1k": _cfg("MambaVision-L-21K", "mambavision_large_21k.pth.tar"),
        "mamba_vision_L2.in1k": _cfg("MambaVision-L2-1K", "mambavision_large2_1k.pth.tar"),
        "mamba_vision_L2_512_21k.in21k_ft_in1k": _cfg(
            "MambaVision-L2-512-21K", "mambavision_L2_21k_240m_512.pth.tar", **_AT_512
        ),
        "mamba_vision_L3_256_21k.in21k_ft_in1k": _cfg(
            "MambaVision-L3-256-21K", "mambavision_L3_21k_740m_256.pth.tar", **_AT_256
        ),
        "mamba_vision_L3_512_21k.in21k_ft_in1k": _cfg(
            "MambaVision-L3-512-21K", "mambavision_L3_21k_740m_512.pth.tar", **_AT_512
        ),
    }
)

# Widths, depths and windows of the released models; windows equal the maps at the native image size.
_TINY = {
    "dim": 80,
    "in_dim": 32,
    "depths": (1, 3, 8, 4),
    "num_heads": (2, 4, 8, 16),
    "window_size": (8, 8, 14, 7),
    "drop_path_rate": 0.2,
}
_TINY2 = {**_TINY, "depths": (1, 3, 11, 4)}
_SMALL = {**_TINY, "dim": 96, "in_dim": 64, "depths": (3, 3, 7, 5)}
_BASE = {**_SMALL, "dim": 128, "depths": (3, 3, 10, 5), "drop_path_rate": 0.3, "layer_scale": 1e-5}
_LARGE = {**_BASE, "dim": 196, "num_heads": (4, 8, 16, 32)}
_LARGE2 = {**_LARGE, "depths": (3, 3, 12, 5)}
_LARGE2_512 = {**_LARGE2, "window_size": (8, 8, 32, 16)}
_LARGE3_256 = {**_LARGE, "dim": 256, "depths": (3, 3, 20, 10), "window_size": (8, 8, 16, 8), "drop_path_rate": 0.5}
_LARGE3_512 = {**_LARGE3_256, "window_size": (8, 8, 32, 16)}


@register_model
def mamba_vision_T(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """Tiny, 31.8 M parameters."""
    return build(MambaVision, "mamba_vision_T", pretrained, **{**_TINY, **kwargs})


@register_model
def mamba_vision_T2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """Tiny with a deeper third stage, 35.1 M parameters."""
    return build(MambaVision, "mamba_vision_T2", pretrained, **{**_TINY2, **kwargs})


@register_model
def mamba_vision_S(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """Small, 50.1 M parameters."""
    return build(MambaVision, "mamba_vision_S", pretrained, **{**_SMALL, **kwargs})


@register_model
def mamba_vision_B(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """Base, 97.7 M parameters."""
    return build(MambaVision, "mamba_vision_B", pretrained, **{**_BASE, **kwargs})


@register_model
def mamba_vision_B_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """Base, pre-trained on ImageNet-21K."""
    return build(MambaVision, "mamba_vision_B_21k", pretrained, **{**_BASE, **kwargs})


@register_model
def mamba_vision_L(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """Large, 228.0 M parameters."""
    return build(MambaVision, "mamba_vision_L", pretrained, **{**_LARGE, **kwargs})


@register_model
def mamba_vision_L_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """Large, pre-trained on ImageNet-21K."""
    return build(MambaVision, "mamba_vision_L_21k", pretrained, **{**_LARGE, **kwargs})


@register_model
def mamba_vision_L2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """Large with a deeper third stage, 241.6 M parameters."""
    return build(MambaVision, "mamba_vision_L2", pretrained, **{**_LARGE2, **kwargs})


@register_model
def mamba_vision_L2_512_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """L2 for 512-pixel images, pre-trained on ImageNet-21K."""
    return build(MambaVision, "mamba_vision_L2_512_21k", pretrained, **{**_LARGE2_512, **kwargs})


@register_model
def mamba_vision_L3_256_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """The largest, 739.6 M parameters, for 256-pixel images, pre-trained on ImageNet-21K."""
    return build(MambaVision, "mamba_vision_L3_256_21k", pretrained, **{**_LARGE3_256, **kwargs})


@register_model
def mamba_vision_L3_512_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """L3 for 512-pixel images, pre-trained on ImageNet-21K."""
    return build(MambaVision, "mamba_vision_L3_512_21k", pretrained, **{**_LARGE3_512, **kwargs})
