"""Recording of the inputs of a block's scan or attention while the model runs.

A torch function mode intercepts the operators, so the models need no support for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mambavision.errors import ArgumentError
from mambavision.models.staged import StagedModel
from mambavision.text import nearest
from mambavision.timm_model import TimmModel
from vision_kernels.cross_scan import ROUTES, Route
from vision_kernels.mamba_mixer.composed import mamba_mixer_composed
from vision_kernels.ss2d.unfused import scan_arguments


@dataclass(frozen=True)
class Layout:
    """Places of the positions of sequences in a map.

    A sequence is a window of the map, in row-major order. Windows are ordered row by row; the last ones of a row or
    column may extend into padding. Models without windows have a single one.
    """

    height: int  # of the map
    width: int
    window: tuple[int, int]  # height and width of a window

    @property
    def windows(self) -> tuple[int, int]:
        """Numbers of rows and columns of windows."""
        return -(-self.height // self.window[0]), -(-self.width // self.window[1])


@dataclass(frozen=True)
class ScanRecord:
    """The selective scans of a block."""

    delta: Tensor  # (batch x windows, routes, dim, length), after the softplus
    A: Tensor  # (routes, dim, state)
    B: Tensor  # (batch x windows, routes, state, length)
    C: Tensor  # like B
    routes: tuple[Route, ...]  # the order in which each route reads a window
    layout: Layout


@dataclass(frozen=True)
class AttentionRecord:
    """The softmax attention of a block."""

    weights: Tensor  # (batch x windows, heads, length, length); rows sum to one
    layout: Layout


class _Recorder(TorchFunctionMode):
    """Records the arguments of scans and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict[str, Any]]] = []
        self._of_interest = (
            torch.ops.vision_kernels.ss2d,
            torch.ops.vision_kernels.selective_scan,
            F.scaled_dot_product_attention,
        )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if any(function is each for each in self._of_interest):
            self.calls.append((function, args, kwargs or {}))
        if function is torch.ops.vision_kernels.mamba_mixer:
            with self:  # for the scan inside
                return mamba_mixer_composed(*args)
        return function(*args, **(kwargs or {}))


def block_name(model: TimmModel, stage: int, block: int) -> str:
    """Return the name of a block: ``layers.2.blocks.1`` in a model with stages, ``blocks.1`` in others.

    Raises:
        ArgumentError: The stage or block does not exist.
    """
    prefix = ""
    if isinstance(model, StagedModel):
        if not 0 <= stage < len(model.stages):
            raise ArgumentError(
                f"{type(model).__name__}: has no stage {stage}; it has {len(model.stages)}, counted from 0."
            )
        prefix = model.feature_info[stage]["module"] + "."
    names = dict(model.named_modules())
    blocks = names.get(f"{prefix}blocks", ())
    if not 0 <= block < len(blocks):
        where = f"stage {stage} of " if prefix else ""
        raise ArgumentError(
            f"{where}{type(model).__name__}: has no block {block}; it has {len(blocks)}, counted from 0."
        )
    return f"{prefix}blocks.{block}"


@torch.no_grad()
def record_blocks(model: TimmModel, images: Tensor, names: Sequence[str]) -> list[ScanRecord | AttentionRecord]:
    """Run a model in evaluation mode and return the inputs of the scans or attention of some blocks.

    Args:
        model: VMamba, MambaVision, or a vision transformer of timm with fused attention.
        images: (batch, channels, height, width).
        names: Names of modules with one (two-dimensional) scan or attention each, such as ``layers.2.blocks.1``.

    Raises:
        ArgumentError: There is no module with that name, or it does not have exactly one scan or attention over a whole
            map or window.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ArgumentError(f"{type(model).__name__}: has no module {name!r}.{nearest(name, modules)}")
    calls: dict[str, list] = {}
    sizes: dict[str, torch.Size] = {}

    def record(name: str) -> Callable:
        def run(module, args, kwargs):
            # An extra run for the recorder: a mode entered in this hook and left in one after the module would remain
            # active if the module failed.
            with _Recorder() as recorder:
                module.forward(*args, **kwargs)
            calls[name] = recorder.calls

        return run

    def keep_size(stage: str) -> Callable:
        return lambda module, args: sizes.update({stage: args[0].shape[-2:]})

    stages = {name.rpartition(".blocks.")[0] for name in names}
    hooks = [modules[name].register_forward_pre_hook(record(name), with_kwargs=True) for name in names]
    hooks += [modules[stage].register_forward_pre_hook(keep_size(stage)) for stage in stages if stage]
    was_training = model.training
    model.eval()
    try:
        model(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return [_record(model, name, calls.get(name, []), sizes, images) for name in names]


def _record(
    model: TimmModel, name: str, calls: list, sizes: dict[str, torch.Size], images: Tensor
) -> ScanRecord | AttentionRecord:
    what = f"{name} of {type(model).__name__}"
    if not calls:
        raise ArgumentError(f"{what}: has neither a selective scan nor fused attention; choose another block.")
    if len(calls) > 1:
        raise ArgumentError(f"{what}: has {len(calls)} consecutive scans, which have no common map.")
    ((function, args, kwargs),) = calls
    if function is torch.ops.vision_kernels.ss2d:
        return _of_ss2d(*args[:-1])
    layout, prefix = _layout(model, name, what, sizes, images)
    if function is torch.ops.vision_kernels.selective_scan:
        return _of_scan(layout, *args[:-1])
    query, key, _, *others = args
    # With the identity matrix as values, the result is the attention matrix, including masks and scales.
    identity = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device).expand(*key.shape[:-1], -1)
    weights = function(query, key, identity, *others, **kwargs)
    return AttentionRecord(weights[..., prefix:, prefix:], layout)


def _of_ss2d(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: str
) -> ScanRecord:
    height, width = x.shape[2:]
    _, (_, delta, A, B, C, _, bias) = scan_arguments(x, projections, dt_weight, dt_bias, A, D, routes)
    delta, A = F.softplus(delta + bias[:, None]).unflatten(1, (4, -1)), A.unflatten(0, (4, -1))
    return ScanRecord(delta, A, B, C, ROUTES[routes], Layout(height, width, (height, width)))


def _of_scan(layout: Layout, u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last) -> ScanRecord:
    """Return the record of a scan along one route."""
    if channels_last:
        delta, B, C = (each.movedim(1, -1) for each in (delta, B, C))
    delta = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    return ScanRecord(delta[:, None], A[None], B.float(), C.float(), ROUTES["unidirectional"][:1], layout)


def _layout(model: TimmModel, name: str, what: str, sizes: dict[str, torch.Size], images: Tensor) -> tuple[Layout, int]:
    """Return the layout of a block's sequences, and the number of prefix tokens before them."""
    stage = name.rpartition(".blocks.")[0]
    window = getattr(model.get_submodule(stage), "window", None)
    if stage and window:
        height, width = sizes[stage]
        return Layout(height, width, (window, window)), 0
    if not stage and hasattr(model, "num_prefix_tokens"):
        patch_height, patch_width = model.patch_embed.patch_size
        height, width = images.shape[2] // patch_height, images.shape[3] // patch_width
        return Layout(height, width, (height, width)), model.num_prefix_tokens
    raise ArgumentError(
        f"{what}: the places of its tokens in the image are unknown; choose a VMamba, MambaVision or ViT."
    )
