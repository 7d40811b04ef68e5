"""timm's interface for classifiers and backbones in stages, independent of the names in their checkpoints."""

import os
import re
from collections.abc import Sequence
from typing import Any

from timm.layers import SelectAdaptivePool2d, create_classifier, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mambavision.checkpoint import LoadReport, load_pretrained
from mambavision.models.layers import checkpoint
from mambavision.timm_model import TimmModel

AFTER_BLOCKS = (99999,)  # timm's mark for parameters that belong to the group before them


class Stage(nn.Module):
    """Blocks at one resolution, and the downsampling to the next stage if the stage owns it."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def run_blocks(self, x: Tensor, *args: Any) -> Tensor:
        """Apply the blocks; `args` are passed to each of them."""
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, *args)
            else:
                x = block(x, *args)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, H, W) -> same shape."""
        return self.run_blocks(x)


class StagedModel(TimmModel):
    """A stem, stages, a final norm, pooling and a linear classifier.

    A subclass builds the parts under the names of its checkpoints, implements `forward_features` and the methods that
    raise NotImplementedError here, and calls `_create_head` with the options of the classifier. Maps between the parts
    are (batch, width, H, W), in any memory format.

    Attributes:
        stages_name, norm_names: Names of these parts, for parameter groups.
        patch_embed: The stem.
        num_features: Width of the map that is pooled.
        feature_info: timm's description of each stage.
    """

    stages_name: str
    norm_names: tuple[str, ...]

    patch_embed: nn.Module
    feature_info: list[dict[str, Any]]
    global_pool: SelectAdaptivePool2d

    @property
    def stages(self) -> Any:
        """The stages in order: an nn.ModuleList, whose elements torch does not type, of `Stage`."""
        raise NotImplementedError

    def downsample(self, index: int) -> nn.Module:
        """Return the downsampling after a stage; an identity after the last one."""
        return self.stages[index].downsample

    def final_norm(self, x: Tensor) -> Tensor:
        """Apply the layers between the last stage and the pooling."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> (batch, num_features, H/32, W/32), normalised."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """Return the classifier: a linear layer, or an identity."""
        raise NotImplementedError

    def _set_classifier(self, head: nn.Module) -> None:
        raise NotImplementedError

    def _remove_norm(self) -> None:
        """Replace the layers between the last stage and the pooling by identities."""
        raise NotImplementedError

    def _cut(self, last: int) -> None:
        """Remove everything after a stage."""
        setattr(self, self.stages_name, self.stages[: last + 1])
        self.stages[last].downsample = nn.Identity()

    def forward_stem(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> the input of the first stage."""
        return self.patch_embed(x)

    def load_pretrained(self, path: str | os.PathLike) -> LoadReport:
        """Load a released file; timm calls this with the file that it has downloaded."""
        return load_pretrained(self, path)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to biases and other vectors."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups by depth, for layer-wise learning rates."""
        fine = [
            (rf"^{self.stages_name}\.(\d+)\.blocks\.(\d+)", None),
            (rf"^{self.stages_name}\.(\d+)\.downsample", AFTER_BLOCKS),
            *((rf"^{re.escape(name)}\.", AFTER_BLOCKS) for name in self.norm_names),
        ]
        return {"stem": r"^patch_embed", "blocks": rf"^{self.stages_name}\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of the blocks in the backward pass instead of storing them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `num_classes` 0 removes it.

        Args:
            num_classes: Classes of the new one.
            global_pool: Pooling type; None keeps the current one, or avg if there is none and a classifier needs it.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type or ("avg" if num_classes else "")
        self._create_head(num_classes, global_pool)
        init_linear(self.get_classifier())

    def _create_head(self, num_classes: int, global_pool: str) -> None:
        if num_classes and not global_pool:
            raise ValueError(f"a classifier for {num_classes} classes needs global_pool: avg, max, avgmax or catavgmax")
        reference = next(self.parameters())
        self.num_classes = num_classes
        self.global_pool, head = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=reference.device, dtype=reference.dtype
        )
        self._set_classifier(head)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the features of stages, each before its downsampling.

        Args:
            x: (batch, in_chans, H, W) images.
            indices: Stages to return: the last n, a list, or None for all.
            norm: Apply the final normalisation to the last stage's features.
            stop_early: Do not run stages after the last requested one.
            output_fmt: NCHW or NHWC.
            intermediates_only: Return the features only.

        Returns:
            The final features as `forward_features` gives them, and the list of stage features; or that list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        intermediates = []
        x = self.forward_stem(x)
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in take:
                feature = self.final_norm(x) if norm and index == len(self.stages) - 1 else x
                feature = feature if output_fmt == "NCHW" else feature.permute(0, 2, 3, 1)
                intermediates.append(feature.contiguous())
            if index < len(stages) - 1:
                x = self.downsample(index)(x)
        if intermediates_only:
            return intermediates
        return self.final_norm(x) if len(stages) == len(self.stages) else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove all layers that the features of the stages `indices` do not need."""
        take, last = feature_take_indices(len(self.stages), indices)
        if last < len(self.stages) - 1:
            prune_norm = prune_head = True  # both are sized for the last stage
        self._cut(last)
        if prune_norm:
            self.num_features = self.feature_info[last]["num_chs"]
            self._remove_norm()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(batch, num_features, H/32, W/32) -> (batch, num_features) if `pre_logits`, else (batch, num_classes)."""
        x = self.global_pool(x)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as in the original code; leave other modules unchanged."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
