"""Optimizer steps of mmengine that are taken only if loss and gradients are finite."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_comm_device, get_rank, get_world_size, is_distributed
from mmengine.optim import OptimWrapper, OptimWrapperDict

from mambavision.errors import NonFiniteError, UserError
from mambavision.running.finite import FiniteGuard
from mambavision.running.group import Group
from mambavision.running.process import Process
from mambavision.running.signals import StopSignals


def current_group() -> Group:
    """Return the group of processes that mmengine works in."""
    device = torch.device(get_comm_device() if is_distributed() else get_device())
    return Group(Process(get_rank(), world_size=get_world_size()), device)


class GuardedSteps:
    """Checks every step of an optimizer wrapper with a `FiniteGuard` before it is taken.

    Set `batch` before each iteration. After a step, `must_stop` is True on all processes if any was asked to stop.

    Args:
        wrapper: The optimizer wrapper, whose methods are replaced.
        guard: Checks loss and gradients.
        signals: Requests to stop, which are exchanged together with the check.
        advice: Returns what to add to the error message of a step that is not taken.

    Raises:
        UserError: There are several optimizers.
    """

    def __init__(
        self, wrapper: OptimWrapper, guard: FiniteGuard, signals: StopSignals, advice: Callable[[], str]
    ) -> None:
        if isinstance(wrapper, OptimWrapperDict):
            raise UserError(f"optim_wrapper: {type(wrapper).__name__} has several optimizers; give one.")
        self.batch: Any = None
        self.must_stop = False
        self._guard, self._signals, self._advice, self._optimizer = guard, signals, advice, wrapper.optimizer
        scaler = getattr(wrapper, "loss_scaler", None)
        self._has_loss_scale = scaler is not None and scaler.is_enabled()
        self._was_taken = False
        self._optimizer.register_step_pre_hook(self._note_taken)
        wrapper.update_params = self._noting_loss(wrapper.update_params)
        wrapper.step = self._guarding(wrapper.step)

    def _note_taken(self, *_: Any) -> None:
        self._was_taken = True

    def _noting_loss(self, update_params: Callable[..., None]) -> Callable[..., None]:
        def note_and_update(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            self._guard.note(loss, partial(_names, self.batch))
            update_params(loss, *args, **kwargs)

        return note_and_update

    def _guarding(self, step: Callable[..., None]) -> Callable[..., None]:
        @wraps(step)  # mmengine's schedulers look for their mark on it
        def check_and_step(**kwargs: Any) -> None:
            parameters = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
            gradients = [] if self._has_loss_scale else [each.grad for each in parameters if each.grad is not None]
            try:
                self.must_stop = self._guard.check(gradients, self._signals.received, self._has_loss_scale)
                self._was_taken = False
                step(**kwargs)
                if self._has_loss_scale:
                    self._guard.count_skip(not self._was_taken)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} {self._advice()}") from None

        return check_and_step


def _names(batch: Any) -> Sequence[str]:
    """Return the paths of the images in a batch of mmdet or mmseg."""
    samples = batch.get("data_samples") if isinstance(batch, dict) else None
    if not isinstance(samples, Sequence):
        return ["a batch without data_samples"]
    return [str(getattr(sample, "img_path", "an image without img_path")) for sample in samples]
