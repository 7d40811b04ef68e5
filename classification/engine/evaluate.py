"""Scoring a classifier on a labelled data set."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from timm.data import RealLabelsImagenet
from timm.task.evaluator import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn

from engine.data import SKIPPED


@torch.no_grad()  # in inference mode, sharded training would keep unusable buffers
def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    memory_format: torch.memory_format = torch.contiguous_format,
    distributed: bool = False,
    classes: list[int] | None = None,
    real_labels: RealLabelsImagenet | None = None,
    on_batch: Callable[[int, int], object] = lambda batch, images: None,
) -> dict[str, float]:
    """Return the loss (cross entropy) and the top-1 and top-5 accuracy in percent; each image counts once.

    The loss is NaN if any logit is not finite.

    Args:
        model: Maps (batch, channels, H, W) to logits; put in evaluation mode if it is a module.
        loader: Batches; images with the target `SKIPPED` are ignored.
        distributed: Combine the counts of all processes.
        classes: Use only these columns of the logits; targets are indices into them.
        real_labels: Collects predictions for the ImageNet-ReaL labels.
        on_batch: Called after each batch with its index and size.
    """
    if isinstance(model, nn.Module):
        model.eval()
    limit = evaluation_sample_limit(loader)  # the loader pads, so that processes get the same number of batches
    evaluator = ClassificationEvaluator(device)
    seen = 0
    for index, (images, targets) in enumerate(loader):
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        targets = targets.to(device, non_blocking=True)
        with autocast():
            logits = model(images)
        if limit is not None:
            logits, targets = logits[: max(0, limit - seen)], targets[: max(0, limit - seen)]
        seen += len(images)
        if classes is not None:
            logits = logits[:, classes]
        # With non-finite logits the largest one means nothing; neither should the loss.
        logits = logits.where(logits.isfinite().all(dim=1, keepdim=True), torch.nan)
        if real_labels is not None:
            real_labels.add_result(logits)
        counted = targets != SKIPPED
        evaluator.update(logits[counted], targets[counted])
        on_batch(index, len(images))
    return dict(evaluator.compute(distributed))
