"""Guard against optimizer steps whose loss or gradient is infinite or NaN."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mambavision.errors import NonFiniteError
from mambavision.running.group import Group

_SKIPPED_STEPS = 25  # consecutive ones, after which a run with a loss scale stops
_NAMED = 8  # samples, of each process


class FiniteGuard:
    """Checks each optimizer step before it is taken; all processes agree, so that they stop at the same step.

    For each step: `note` every batch, then `check`; with a loss scale (float16) also `count_skip`.

    Args:
        group: All processes of the run.
    """

    def __init__(self, group: Group) -> None:
        self._group, self._device = group, group.device
        self._batches: list[tuple[Tensor, Callable[[], Sequence[str]]]] = []
        self._skipped = 0

    def note(self, loss: Tensor, samples: Callable[[], Sequence[str]]) -> None:
        """Record a batch of the next step: its loss (a scalar), and a function that names its samples."""
        self._batches.append((torch.isfinite(loss.detach()), samples))

    def check(self, gradients: Iterable[Tensor], also: bool = False, has_loss_scale: bool = False) -> bool:
        """Raise unless losses and gradients of all processes are finite; collective, before the step.

        Args:
            gradients: Gradients of this process; not needed with a loss scale.
            also: A flag that is reduced in the same collective.
            has_loss_scale: A loss scale handles overflow: it skips the step if a loss or gradient is not finite.

        Returns:
            True if `also` is set on any process.

        Raises:
            NonFiniteError: The message names the samples of the processes whose loss is not finite, or of all
                processes if only the gradient is not. The step was not taken.
        """
        losses_are_finite = _all([is_finite for is_finite, _ in self._batches], self._device)
        gradients_are_finite = _all([_largest(gradients, self._device).isfinite()], self._device)
        asked = torch.tensor(also, device=self._device)
        flags = torch.stack(
            (~losses_are_finite, ~gradients_are_finite, asked)
        )  # one tensor, so that the GPU is waited for once
        bad_loss, bad_gradient, also = self._group.any(flags)
        if (bad_loss or bad_gradient) and not has_loss_scale:
            raise NonFiniteError(self._explanation("loss" if bad_loss else "gradient"))
        self._batches.clear()
        return also

    def count_skip(self, was_skipped: bool) -> None:
        """Count consecutive steps that the loss scale has skipped; single ones are normal.

        Raises:
            NonFiniteError: There are too many.
        """
        self._skipped = self._skipped + 1 if was_skipped else 0
        if self._skipped >= _SKIPPED_STEPS:
            raise NonFiniteError(
                f"the loss or gradient overflowed in {self._skipped} steps in a row, whatever the loss scale."
            )

    def _explanation(self, what: str) -> str:
        own = [
            name
            for is_finite, samples in self._batches
            if what == "gradient" or not is_finite.item()
            for name in samples()
        ]
        named = "; ".join(
            f"process {rank}: {', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''}"
            for rank, names in enumerate(self._group.gather(own))
            if names
        )
        return f"the {what} is not finite; stopped before the optimizer's step. Samples: {named}."


def _all(flags: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([flag.to(device) for flag in flags]).all() if flags else torch.tensor(True, device=device)


def _largest(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the largest magnitude in this process's part of the gradients; their 2-norm could overflow."""
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    filled = [gradient for gradient in local if gradient.numel()]
    return torch.nn.utils.get_total_norm(filled, norm_type=math.inf) if filled else torch.zeros((), device=device)
