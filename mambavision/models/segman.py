"""SegMAN's encoder: scans and neighbourhood attention in one mixer (Fu et al. 2024, https://arxiv.org/abs/2412.11890).

Four stages at strides 4, 8, 16 and 32. In the first three, every block applies neighbourhood attention followed by a
scan; in the last one, neighbourhood attention is followed by global attention.

Parameter names and numbers are those of the released checkpoints.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from mambavision.models.build import build
from mambavision.models.layers import DepthwiseConv, PointwiseConv, drop_path_rates
from mambavision.models.ss2d import VSSM
from mambavision.models.staged import AFTER_BLOCKS, Stage, StagedModel
from vision_kernels import neighborhood_attention

NORM_EPS = 1e-6
_REFERENCE_SIZE = 224  # image size for which the global bias was trained


class RotaryEmbedding(nn.Module):
    """Rotary position embedding on two axes (Su et al. 2021, https://arxiv.org/abs/2104.09864), with attention's scale.

    The first half of a head's channels is rotated by the row, the second by the column. The frequencies are part of
    checkpoints.
    """

    angle: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 4)
        self.register_buffer("angle", frequencies.repeat_interleave(2))

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for `rotate`, (height, width, 2, 1, head_dim) each: for scaled queries and keys."""
        rows = torch.arange(height, device=self.angle.device)[:, None] * self.angle
        columns = torch.arange(width, device=self.angle.device)[:, None] * self.angle
        rows, columns = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
        theta = torch.cat([rows, columns], dim=-1)
        sin = theta.sin().unflatten(-1, (-1, 2)) * theta.new_tensor([-1.0, 1.0])
        return self._for_queries_and_keys(theta.cos()), self._for_queries_and_keys(sin.flatten(-2))

    def _for_queries_and_keys(self, factors: Tensor) -> Tensor:
        return torch.stack([factors * self.scale, factors], dim=2).unsqueeze(3)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels: (a, b) becomes (a cos - b sin, b cos + a sin).

    Args:
        x: (..., head_dim).
        cos: Cosine for each channel.
        sin: Sine for each channel, negative for the first of a pair.
    """
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


class TokenMixer(nn.Module):
    """Neighbourhood attention, followed by a scan or by global attention.

    Args:
        dim: Channels.
        heads: Heads of attention.
        window: Side of the neighbourhood; on smaller maps, the largest odd number that fits.
        is_global: Use global attention instead of a scan.
    """

    def __init__(self, dim: int, heads: int, window: int, is_global: bool) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.is_global = is_global
        self.qkv = PointwiseConv(dim, 3 * dim)
        self.lepe = DepthwiseConv(dim, 5)
        self.proj = PointwiseConv(dim, dim)
        biases = [torch.zeros(heads, 2 * window - 1, 2 * window - 1)]
        if is_global:
            tokens = (_REFERENCE_SIZE // 32) ** 2
            biases.append(torch.zeros(heads, tokens, tokens))
        else:
            self.dwconv = nn.Sequential(DepthwiseConv(dim, 3), nn.BatchNorm2d(dim))
            self.ssm = VSSM(dim)
            self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.rpb = nn.ParameterList(nn.Parameter(bias) for bias in biases)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, height, width, dim) -> same shape; cos and sin are those of `RotaryEmbedding`."""
        qkv = self.qkv(x)
        local_bias = self.lepe(qkv.chunk(3, dim=-1)[2])
        # (batch, height, width, query | key | value, heads, head_dim)
        both, value = qkv.unflatten(-1, (3, self.heads, -1)).split([2, 1], dim=3)
        query, key = rotate(both, cos, sin).permute(3, 0, 4, 1, 2, 5)
        value = value.squeeze(3).permute(0, 3, 1, 2, 4)  # (batch, heads, height, width, head_dim), as query and key
        attended = self._attend_locally(query, key, value)
        if self.is_global:
            y = _merge_heads(self._attend_globally(query, key, attended))
        else:
            y = _merge_heads(attended)
            conv, batch_norm = self.dwconv
            # A plain batch norm between permutations, so that programs can replace it by a synchronised one.
            entering = batch_norm(conv(y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = y + self.norm(self.ssm(F.silu(entering)))
        return self.proj(y + local_bias)

    def _attend_locally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All (batch, heads, height, width, head_dim)."""
        smaller = min(*query.shape[2:4])
        window = min(self.window, smaller - 1 + smaller % 2)
        bias, margin = self.rpb[0], self.window - window
        if margin:
            bias = bias[:, margin:-margin, margin:-margin]
        return neighborhood_attention(query, key, value, window, bias=bias)

    def _attend_globally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `_attend_locally`; the values are the result of the local attention."""
        queries, keys, values = (each.flatten(2, 3) for each in (query, key, value))
        bias, length = self.rpb[1], queries.shape[2]
        if bias.shape[-1] != length:
            # The original resizes the matrix of all pairs like an image, and its weights were trained that way.
            bias = F.interpolate(bias[None].float(), (length, length), mode="bicubic")[0].to(bias.dtype)
        mask = bias.to(query.dtype).expand(query.shape[0], -1, -1, -1)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
        return attended.unflatten(2, query.shape[2:4])


def _merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, height, width, head_dim) -> (batch, height, width, heads x head_dim)."""
    return x.permute(0, 2, 3, 1, 4).flatten(3)


class ConvMlp(nn.Module):
    """MLP with a residual depthwise convolution on its hidden layer."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden)
        self.dwconv = DepthwiseConv(hidden, 3)
        self.fc2 = PointwiseConv(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class LayerScale(nn.Module):
    """Scale and shift per channel, stored like the parameters of a convolution."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), value))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.flatten() + self.bias


class ResidualBlock(nn.Module):
    """Pre-norm residual block of a mixer and an MLP, each after a convolution that encodes positions.

    Args:
        mixer: Called with the normalised map and the further arguments of `forward`.
        hidden: Hidden width of the MLP.
        drop_path: Stochastic depth rate.
        layer_scale: Initial scale of the branches; None for no scale.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, hidden: int, drop_path: float = 0.0, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        self.cpe1 = DepthwiseConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.token_mixer = mixer
        self.cpe2 = DepthwiseConv(dim, 3)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = ConvMlp(dim, hidden)
        self.drop_path = DropPath(drop_path)
        self.layer_scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.layer_scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """(batch, height, width, dim) -> same shape."""
        x = x + self.cpe1(x)
        x = x + self.drop_path(self.layer_scale1(self.token_mixer(self.norm1(x), *args)))
        x = x + self.cpe2(x)
        return x + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))


class SegMANStage(Stage):
    """Channels-last blocks and their shared position embedding."""

    def __init__(self, blocks: Sequence[nn.Module], head_dim: int) -> None:
        super().__init__(blocks)
        self.rope = RotaryEmbedding(head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, H, W) -> same shape."""
        return self.run_blocks(x.permute(0, 2, 3, 1), *self.rope(*x.shape[2:])).permute(0, 3, 1, 2)


class SegMANEncoder(StagedModel):
    """SegMAN's encoder: classifier and backbone.

    Args:
        embed_dims: Width of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: Side of the neighbourhood of each stage.
        mlp_ratios: Hidden width of the MLPs of each stage relative to their input width.
        projection: Width of the layer before the classifier.
        layer_scale: Initial scale of the branches; None for no scale.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        in_chans: Channels of the images.
        num_classes: Classes; 0 gives pooled features instead of logits.
        global_pool: timm's pooling types: avg, max, avgmax, catavgmax, or an empty string for none.
    """

    stages_name = "layers"
    layers: nn.ModuleList
    norm_names = ("classifier.0", "classifier.1", "classifier.2")

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: Sequence[int],
        mlp_ratios: Sequence[float],
        projection: int = 1024,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_features = projection
        self.patch_embed = _stem(in_chans, embed_dims[0])
        drop_paths = drop_path_rates(drop_path_rate, depths)
        self.layers = nn.ModuleList()  # stages and downsamplings alternate
        self.feature_info = []
        last = len(depths) - 1
        for stage, (dim, heads, ratio) in enumerate(zip(embed_dims, num_heads, mlp_ratios, strict=True)):
            blocks = [
                ResidualBlock(
                    dim, TokenMixer(dim, heads, window_size[stage], stage == last), int(dim * ratio), rate, layer_scale
                )
                for rate in drop_paths[stage]
            ]
            self.layers.append(SegMANStage(blocks, dim // heads))
            self.layers.append(_downsample(dim, embed_dims[stage + 1]) if stage < last else nn.Identity())
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**stage, "module": f"layers.{2 * stage}"})
        # Projection, norm, activation, and the classifier at the index that it has in checkpoints.
        self.classifier = nn.Sequential(
            nn.Conv2d(embed_dims[-1], projection, 1),
            nn.BatchNorm2d(projection),
            nn.SiLU(),
            nn.Identity(),
            nn.Identity(),
        )
        self._create_head(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> (batch, num_features, H/32, W/32), normalised."""
        x = self.patch_embed(x)
        for layer in self.layers:  # stages and downsamplings alternate
            x = layer(x)
        return self.final_norm(x)

    @property
    def stages(self) -> Any:
        return self.layers[0::2]

    def downsample(self, index: int) -> nn.Module:
        return self.layers[2 * index + 1]

    def final_norm(self, x: Tensor) -> Tensor:
        projection, norm, activation, *_ = self.classifier
        return activation(norm(projection(x)))

    def get_classifier(self) -> nn.Module:
        return self.classifier[4]

    def _set_classifier(self, head: nn.Module) -> None:
        if isinstance(head, nn.Linear):
            weight = head.weight
            head = PointwiseConv(head.in_features, head.out_features, device=weight.device, dtype=weight.dtype)
        self.classifier[4] = head

    def _remove_norm(self) -> None:
        for index in range(3):
            self.classifier[index] = nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        matcher = super().group_matcher(coarse)
        if coarse:  # the downsampling after a stage belongs to it
            pairs = range(0, len(self.layers), 2)
            matcher["blocks"] = [(rf"^layers\.(?:{index}|{index + 1})\.", (index,)) for index in pairs]
        else:
            matcher["blocks"].append((r"^layers\.(\d+)\.[01]\.", AFTER_BLOCKS))
        return matcher

    def _cut(self, last: int) -> None:
        self.layers = self.layers[: 2 * last + 1].append(nn.Identity())


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    half = dim // 2
    return nn.Sequential(
        nn.Conv2d(in_chans, half, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.GELU(),
        nn.Conv2d(half, half, 3, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.GELU(),
        nn.Conv2d(half, dim, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(dim),
        nn.GELU(),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        nn.BatchNorm2d(dim),
    )


def _downsample(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out_dim))


def _cfg(release: str, crop_pct: float) -> dict[str, Any]:
    return {
        # The authors share the file without an address for automatic downloads.
        "notes": (release,),
        "origin_url": "https://github.com/yunxiangfu2001/SegMAN",
        "license": "of the authors: see https://github.com/yunxiangfu2001/SegMAN",
        "paper_name": "SegMAN: Omni-scale Context Modeling with State Space Models and Local Attention",
        "paper_ids": "arXiv:2412.11890",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0",
        "classifier": "classifier.4",
    }


default_cfgs = generate_default_cfgs(
    {
        "segman_encoder_t.in1k": _cfg("released as SegMAN_Encoder_t.pth.tar", 0.9),
        "segman_encoder_s.in1k": _cfg("released as SegMAN_Encoder_s.pth.tar", 0.9),
        "segman_encoder_b.in1k": _cfg("released as SegMAN_Encoder_b.pth.tar", 0.95),
        "segman_encoder_l.in1k": _cfg("released as SegMAN_Encoder_l.pth.tar", 0.95),
        "segman_encoder_l2.in1k": _cfg("none of this encoder are known", 0.95),
    }
)

_TINY: dict[str, Any] = {
    "embed_dims": (32, 64, 144, 192),
    "depths": (2, 2, 4, 2),
    "num_heads": (1, 2, 4, 8),
    "window_size": (11, 9, 9, 7),
    "mlp_ratios": (4, 4, 3, 3),
}
_SMALL: dict[str, Any] = {
    "embed_dims": (64, 144, 288, 512),
    "depths": (2, 2, 10, 4),
    "num_heads": (2, 4, 8, 16),
    "window_size": (11, 9, 7, 7),
    "mlp_ratios": (4, 4, 3.4, 3.4),
}
_BASE: dict[str, Any] = {
    "embed_dims": (96, 160, 364, 560),
    "depths": (4, 4, 18, 4),
    "num_heads": (4, 8, 13, 20),
    "window_size": (11, 9, 7, 7),
    "mlp_ratios": (4, 4, 3, 3),
    "layer_scale": 1e-6,
}
_LARGE = {**_BASE, "embed_dims": (96, 192, 432, 640), "depths": (4, 4, 28, 4), "num_heads": (4, 8, 12, 20)}
_LARGE2 = {**_BASE, "embed_dims": (96, 192, 448, 640), "depths": (4, 4, 26, 4), "num_heads": (4, 8, 14, 20)}
VARIANTS = {"t": _TINY, "s": _SMALL, "b": _BASE, "l": _LARGE, "l2": _LARGE2}


@register_model
def segman_encoder_t(pretrained: bool = False, **kwargs: Any) -> SegMANEncoder:
    """Tiny, 3.5 M parameters with the classifier."""
    return build(SegMANEncoder, "segman_encoder_t", pretrained, **{**_TINY, **kwargs})


@register_model
def segman_encoder_s(pretrained: bool = False, **kwargs: Any) -> SegMANEncoder:
    """Small, 25.5 M parameters."""
    return build(SegMANEncoder, "segman_encoder_s", pretrained, **{**_SMALL, **kwargs})


@register_model
def segman_encoder_b(pretrained: bool = False, **kwargs: Any) -> SegMANEncoder:
    """Base, 45.0 M parameters."""
    return build(SegMANEncoder, "segman_encoder_b", pretrained, **{**_BASE, **kwargs})


@register_model
def segman_encoder_l(pretrained: bool = False, **kwargs: Any) -> SegMANEncoder:
    """Large, 81.0 M parameters."""
    return build(SegMANEncoder, "segman_encoder_l", pretrained, **{**_LARGE, **kwargs})


@register_model
def segman_encoder_l2(pretrained: bool = False, **kwargs: Any) -> SegMANEncoder:
    """Large with a wider and shorter third stage, 81.0 M parameters."""
    return build(SegMANEncoder, "segman_encoder_l2", pretrained, **{**_LARGE2, **kwargs})
