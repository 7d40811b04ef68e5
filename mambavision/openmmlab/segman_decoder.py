"""SegMAN's decoder as a decode head of MMSegmentation (Fu et al. 2024, https://arxiv.org/abs/2412.11890).

A module of its own, because it needs MMSegmentation: ``custom_imports = dict(imports=["mambavision.openmmlab",
"mambavision.openmmlab.segman_decoder"])``.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.dist import get_world_size
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from mambavision.errors import UserError
from mambavision.models.segman import ResidualBlock
from mambavision.models.ss2d import VSSM

_logger = logging.getLogger(__name__)

# Arguments that the original accepts without effect.
_INERT = ("image_size", "channel_split", "short_cut", "use_rpb", "interpolate_mode", "decoder_params")


class PixelLinear(nn.Module):
    """A linear layer applied to each pixel, (batch, in, H, W) -> (batch, out, H, W), named as in checkpoints."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@MODELS.register_module()
class SegMANDecoder(BaseDecodeHead):
    """Decode head that scans a map of stride 8 at three scales at once, all folded to stride 32.

    Module names and numbers are those of the released checkpoints. Logits have stride 8.

    Args:
        in_channels: Widths of the four maps at strides 4, 8, 16 and 32; the first map is not used.
        channels: Width of the decoder.
        feat_proj_dim: Width to which each map is projected.
        in_index: Indices of these maps among the backbone's.
        others: Arguments of ``BaseDecodeHead``. ``norm_cfg`` applies to all convolutions. Arguments that the original
            accepts without effect (``image_size``, ``interpolate_mode``, ...) are ignored, with a log message.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        *,
        feat_proj_dim: int,
        in_index: Sequence[int] = (0, 1, 2, 3),
        **others: Any,
    ) -> None:
        ignored = [name for name in _INERT if name in others]
        if ignored:
            _logger.info("SegMANDecoder: these arguments have no effect: %s", ", ".join(ignored))
        others = {name: value for name, value in others.items() if name not in ignored}
        super().__init__(
            in_channels, channels, **{"input_transform": "multiple_select", "in_index": in_index, **others}
        )
        if self.input_transform != "multiple_select" or len(self.in_channels) != 4:
            raise UserError(
                f"SegMANDecoder: needs four maps, in_channels={in_channels} and in_index={in_index} with "
                f"input_transform='multiple_select'; got input_transform={self.input_transform!r}."
            )
        _, *dims = self.in_channels
        self.conv_downsample_2 = self._conv(channels, 2 * channels, 3, stride=2, padding=1)
        self.conv_downsample_4 = self._conv(channels, 4 * channels, 5, stride=4, padding=1)
        self.linear_c4 = PixelLinear(dims[2], feat_proj_dim)
        self.linear_c3 = PixelLinear(dims[1], feat_proj_dim)
        self.linear_c2 = PixelLinear(dims[0], feat_proj_dim)
        self.linear_fuse = self._conv(3 * feat_proj_dim, channels, 1)
        self.reduce_channels = nn.ModuleList(self._conv(factor * channels, channels, 1) for factor in (4, 8, 16))
        self.vssm = ResidualBlock(3 * channels, VSSM(3 * channels), 12 * channels)
        self.short_path = self._conv(channels, channels, 1)
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), self._conv(channels, channels, 1))
        self.proj_out = self._conv(3 * channels, feat_proj_dim, 1)
        self.cat = self._conv(5 * channels + 3 * feat_proj_dim, channels, 1)

    def _conv(self, in_channels: int, out_channels: int, kernel_size: int, **options: int) -> ConvModule:
        settings = {"conv_cfg": self.conv_cfg, "norm_cfg": self.norm_cfg, "act_cfg": self.act_cfg}
        return ConvModule(in_channels, out_channels, kernel_size, **options, **settings)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps (batch, in_channels[i], H / stride, W / stride) -> logits (batch, num_classes, H / 8, W / 8)."""
        _, c2, c3, c4 = self._transform_inputs(inputs)
        self._check_batch(len(c2))
        u2 = self.linear_c2(c2)
        u3, u4 = (self._resize(linear(x), u2) for linear, x in ((self.linear_c3, c3), (self.linear_c4, c4)))
        x = self.linear_fuse(torch.cat([u4, u3, u2], dim=1))
        pooled = self._resize(self.image_pool(x), x)
        scanned = self._scan(x)
        projected = self.proj_out(scanned)
        parts = [self.short_path(x), pooled, scanned, u2 + projected, u3 + projected, u4 + projected]
        return self.cls_seg(self.cat(torch.cat(parts, dim=1)))

    def _scan(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) at stride 8 -> (batch, 3 x channels, h, w)."""
        height, width = x.shape[2:]
        # Pad to multiples of 4 by repeating the border; the padding is cut off again below.
        x = F.pad(x, (0, -width % 4, 0, -height % 4), mode="replicate")
        # x at full, half and quarter size, all folded to quarter size: pixels become channels.
        folded = (
            self.reduce_channels[2](F.pixel_unshuffle(x, 4)),
            self.reduce_channels[1](F.pixel_unshuffle(self.conv_downsample_2(x), 2)),
            self.reduce_channels[0](self.conv_downsample_4(x)),
        )
        y = self.vssm(torch.cat(folded, dim=1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._resize(y, x)[..., :height, :width]

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        return resize(x, like.shape[2:], mode="bilinear", align_corners=self.align_corners)

    def _check_batch(self, size: int) -> None:
        """Raise a UserError if a batch norm would compute the statistics of a single pixel."""
        norm = self.image_pool[1].norm if self.image_pool[1].with_norm else None
        is_synchronised = isinstance(norm, nn.SyncBatchNorm) and get_world_size() > 1
        if size == 1 and isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training and not is_synchronised:
            raise UserError(
                "SegMANDecoder: training needs batches of two images or more, because image_pool normalises one pixel "
                "of each; raise train_dataloader.batch_size, or use several processes with norm_cfg type SyncBN."
            )
