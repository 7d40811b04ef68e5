"""Effective receptive field: how much each pixel moves the middle of a feature map (Luo et al. 2016,
https://arxiv.org/abs/1701.04128; in the form of Ding et al. 2022, https://arxiv.org/abs/2203.06717)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mambavision.errors import ArgumentError
from mambavision.timm_model import TimmModel


@dataclass(frozen=True)
class ReceptiveField:
    """The mean of the maps of several images."""

    map: Tensor  # (height, width), float64
    images: int  # that the mean is of
    skipped: int  # whose maps were not finite


def receptive_field(model: TimmModel, batches: Iterable[Tensor], stage: int = -1) -> ReceptiveField:
    """Return the mean effective receptive field over images.

    Args:
        model: As for `receptive_field_maps`.
        batches: Batches (batch, channels, height, width) of images, all of one size, on the model's device.
        stage: As for `receptive_field_maps`.

    Raises:
        ArgumentError: There are no images, or no map is finite.
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
        raise ArgumentError(
            f"no receptive field: of {skipped} images not one has a finite gradient; check the weights."
        )
    return ReceptiveField(total / images, images, skipped)


def receptive_field_maps(model: TimmModel, images: Tensor, stage: int = -1) -> Tensor:
    """Return each image's effective receptive field.

    The positive part of the gradient, summed over the image's channels, of the activations in the middle of the
    stage's output, rectified and summed over their channels. The model is in evaluation mode for this.

    Args:
        model: With timm's `forward_intermediates`.
        images: (batch, channels, height, width).
        stage: Which of the intermediates, before any final norm; negative counts from the last.

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
    if not hasattr(model, "forward_intermediates"):
        raise ArgumentError(f"{type(model).__name__}: has no intermediate features (forward_intermediates of timm).")
    count = len(model.feature_info)
    if not -count <= stage < count:
        raise ArgumentError(f"{type(model).__name__}: has no stage {stage}; it has {count}, 0 to {count - 1}.")


def display_scale(field: Tensor) -> Tensor:
    """Return a map in 0 ... 1 in which the eye sees the faint parts as well: its fifth root, over the largest value."""
    root = field**0.2
    return root / root.max()


def smallest_square(field: Tensor, share: float) -> tuple[int, float] | None:
    """Return the smallest square around the middle that holds more than a share of the sum of a map.

    Args:
        field: (height, width).
        share: Of the sum, below 1.

    Returns:
        Its side in pixels, an odd number from 3 on, and its area over that of the map; None if no square that lies
        within the map holds so much.
    """
    height, width = field.shape
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns[None])  # which square's border a pixel is on
    held = torch.bincount(ring.flatten(), weights=field.double().cpu().flatten()).cumsum(0)
    for radius in range(1, (min(height, width) - 1) // 2 + 1):
        if held[radius] > share * held[-1]:
            side = 2 * radius + 1
            return side, side**2 / (height * width)
    return None
