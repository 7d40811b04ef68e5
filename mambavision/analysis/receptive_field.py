"""Effective receptive fields: the influence of each pixel on the centre of a feature map.

Introduced by Luo et al. 2016 (https://arxiv.org/abs/1701.04128), here in the form of Ding et al. 2022
(https://arxiv.org/abs/2203.06717).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mambavision.errors import ArgumentError
from mambavision.timm_model import TimmModel


@dataclass(frozen=True)
class ReceptiveField:
    """Mean effective receptive field of several images."""

    map: Tensor  # (height, width), float64
    images: int  # number of images in the mean
    skipped: int  # number of images whose maps are not finite


def receptive_field(model: TimmModel, batches: Iterable[Tensor], stage: int = -1) -> ReceptiveField:
    """Return the mean effective receptive field over images.

    Args:
        model: See `receptive_field_maps`.
        batches: Batches (batch, channels, height, width) of images of one size, on the model's device.
        stage: See `receptive_field_maps`.

    Raises:
        ArgumentError: There are no images, no map is finite, or the model has no such stage.
    """
    total: Tensor | None = None
    images = skipped = 0
    for batch in batches:
        maps = receptive_field_maps(model, batch, stage)
        finite = maps.isfinite().flatten(1).all(dim=1)
        added = maps[finite].double().sum(dim=0)
        total = added if total is None else total + added
        images += int(finite.sum())
        skipped += int((~finite).sum())
    if total is None or not images:
        raise ArgumentError(f"no receptive field: none of {skipped} images has a finite gradient; check the weights.")
    return ReceptiveField(total / images, images, skipped)


def receptive_field_maps(model: TimmModel, images: Tensor, stage: int = -1) -> Tensor:
    """Return the effective receptive field of each image.

    This is the gradient of the central activations of a stage, rectified and summed over their channels, with respect
    to the image; of the gradient, the positive part is summed over the channels. The model runs in evaluation mode.

    Args:
        model: A model with timm's `forward_intermediates`.
        images: (batch, channels, height, width).
        stage: Index of the stage, whose features are taken before any final norm; negative ones count from the last.

    Returns:
        (batch, height, width)

    Raises:
        ArgumentError: The model has no such stage, or no intermediates.
    """
    check_stage(model, stage)
    images = images.detach().requires_grad_()
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            (features,) = model.forward_intermediates(images, indices=[stage], norm=False, intermediates_only=True)
            middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
            (gradient,) = torch.autograd.grad(middle.relu().sum(), images)
    finally:
        model.train(was_training)
    return gradient.relu().sum(dim=1)


def check_stage(model: TimmModel, stage: int) -> None:
    """Raise an ArgumentError if a model has no intermediate features, or lacks a stage."""
    if not hasattr(model, "forward_intermediates"):
        raise ArgumentError(f"{type(model).__name__}: has no intermediate features (forward_intermediates of timm).")
    count = len(model.feature_info)
    if not -count <= stage < count:
        raise ArgumentError(f"{type(model).__name__}: has no stage {stage}; it has {count}, 0 to {count - 1}.")


def display_scale(field: Tensor) -> Tensor:
    """Return a map scaled to [0, 1] for display: the fifth root, which makes faint parts visible."""
    root = field**0.2
    return root / root.max()


def smallest_square(field: Tensor, share: float) -> tuple[int, float] | None:
    """Return the smallest centred square that contains more than a share of the sum of a map.

    Args:
        field: (height, width).
        share: Share of the sum, below 1.

    Returns:
        The side of the square in pixels, an odd number from 3, and its area relative to the map; None if no square
        within the map contains so much.
    """
    height, width = field.shape
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns[None])  # radius of the square on whose border a pixel lies
    held = torch.bincount(ring.flatten(), weights=field.double().cpu().flatten()).cumsum(0)
    for radius in range(1, (min(height, width) - 1) // 2 + 1):
        if held[radius] > share * held[-1]:
            side = 2 * radius + 1
            return side, side**2 / (height * width)
    return None
