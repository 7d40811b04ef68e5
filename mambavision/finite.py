"""Training steps that must not be taken: a loss or a gradient that is infinite or not a number."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mambavision.errors import BAD_DATA, UserError
from mambavision.exchange import of_all
from mambavision.launch import Process, any_process

_SKIPPED_STEPS = 25  # in a row, before a run with a loss scale stops
_NAMED = 8  # samples, of each process


class NonFiniteError(UserError):
    """A loss, a gradient or an output is infinite or not a number."""

    exit_status = BAD_DATA


class FiniteGuard:
    """Watches over the steps of an optimizer; the processes agree, so that all of them stop at the same step.

    For each step: `note` every batch, then `check`; with a loss scale (float16) also `count_skip`.

    Args:
        process: This process among all.
        device: Where collectives work.
    """

    def __init__(self, process: Process, device: torch.device) -> None:
        self._process, self._device = process, device
        self._batches: list[tuple[Tensor, Callable[[], Sequence[str]]]] = []
        self._skipped = 0

    def note(self, loss: Tensor, samples: Callable[[], Sequence[str]]) -> None:
        """Take note of a batch of the next step: its loss (a scalar), and what gives the names of its samples."""
        self._batches.append((torch.isfinite(loss.detach()), samples))

    def check(self, gradients: Iterable[Tensor], also: bool = False, has_loss_scale: bool = False) -> bool:
        """Raise unless losses and gradients of all processes are finite; to be called on all, before the step.

        Args:
            gradients: Of this process; none are needed with a loss scale.
            also: A flag that travels along.
            has_loss_scale: A loss scale looks after overflow: it skips the step if a loss or gradient is not finite.

        Returns:
            Whether `also` is set on any process.

        Raises:
            NonFiniteError: Names the samples of the processes whose loss is not finite, or of all if only the gradient
                is not. The weights are those of before the step.
        """
        losses_are_finite = _all([is_finite for is_finite, _ in self._batches], self._device)
        gradients_are_finite = _all([_largest(gradients, self._device).isfinite()], self._device)
        asked = torch.tensor(also, device=self._device)
        flags = torch.stack((~losses_are_finite, ~gradients_are_finite, asked))  # read once: a GPU waits for it
        bad_loss, bad_gradient, also = any_process(flags, self._process, self._device)
        if (bad_loss or bad_gradient) and not has_loss_scale:
            raise NonFiniteError(self._explanation("loss" if bad_loss else "gradient"))
        self._batches.clear()
        return also

    def count_skip(self, was_skipped: bool) -> None:
        """Take note of whether the loss scale let a step be skipped, which is normal now and then.

        Raises:
            NonFiniteError: Too many in a row.
        """
        self._skipped = self._skipped + 1 if was_skipped else 0
        if self._skipped >= _SKIPPED_STEPS:
            raise NonFiniteError(
                f"the loss or gradient overflowed in {self._skipped} steps in a row, at whatever loss scale."
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
            for rank, names in enumerate(of_all(own, self._process))
            if names
        )
        return f"the {what} is not finite; stopped before the optimizer's step. Samples: {named}."


def _all(flags: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([flag.to(device) for flag in flags]).all() if flags else torch.tensor(True, device=device)


def _largest(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the largest magnitude in the gradients' part of this process: their usual norm can overflow."""
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    filled = [gradient for gradient in local if gradient.numel()]
    return torch.nn.utils.get_total_norm(filled, norm_type=math.inf) if filled else torch.zeros((), device=device)
