"""Training loops for mmengine's runner that can be left after any step, and go on as if they had not been."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine import Config
from mmengine.dist import all_gather_object, broadcast, get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, set_random_seed
from torch import nn
from torch.utils.data import DataLoader

from mambavision.errors import UserError
from mambavision.openmmlab.training.batches import Showings, exact_loader
from mambavision.openmmlab.training.guarded_steps import GuardedSteps, collective_device, current_process
from mambavision.openmmlab.training.hooks import RECOVERY
from mambavision.running.finite import FiniteGuard
from mambavision.running.random_state import seed_from
from mambavision.running.signals import StopRequested, StopSignals, end_preempted

_EXACT = {"EpochBasedTrainLoop": "ExactEpochLoop", "IterBasedTrainLoop": "ExactIterLoop"}
_POSITION = "position"  # in mmengine's message hub, which is part of every checkpoint


def use_exact_loops(config: Config) -> bool:
    """Let a config for mmengine's own training loops and checkpoint hook use those of this package.

    Returns:
        Whether its loop is one of this package now.
    """
    loop = config.train_cfg
    if "by_epoch" in loop:
        loop.type = "EpochBasedTrainLoop" if loop.pop("by_epoch") else "IterBasedTrainLoop"
    loop.type = _EXACT.get(_name(loop.get("type")), loop.get("type"))
    config.setdefault("default_hooks", {}).setdefault("checkpoint", {"type": "CheckpointHook"})
    hook = config.default_hooks.checkpoint
    if hook is not None and _name(hook.get("type")) == "CheckpointHook":
        hook.type = "SafeCheckpointHook"
    return loop.type in _EXACT.values()


def _name(kind: str | type | None) -> str:
    """``mmengine.CheckpointHook``, or the class itself -> ``CheckpointHook``"""
    return (kind if isinstance(kind, str) else getattr(kind, "__name__", "")).rpartition(".")[-1]


class _WatchValidation(Hook):
    """Breaks a validation off if any process was asked to leave, unless gradients of half a step would be lost.

    Also lets all processes validate the model that is in the checkpoint: batch norms that are not synchronised have
    statistics of their own on each, and those of the first are saved.
    """

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self._common = 0

    def before_val_epoch(self, runner: Runner) -> None:
        """Find out how many batches all processes have, as some may have one more than others."""
        for buffer in runner.model.buffers():
            broadcast(buffer)
        batches = torch.tensor(len(runner.val_loop.dataloader), device=collective_device())
        if current_process().is_distributed:
            torch.distributed.all_reduce(batches, torch.distributed.ReduceOp.MIN)
        self._common = int(batches)

    def after_val_iter(self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        if batch_idx < self._common and runner.optim_wrapper.should_update():
            self._signals.raise_if_received(current_process(), collective_device())


class _ExactLoop:
    """What both loops have in common.

    All random numbers depend on stated numbers alone: those of a sample on seed, process, epoch and sample, those of
    the main process (dropout, the choice of boxes) on seed, process and iteration. So there are no random states to
    save and restore, checkpoints of any iteration do, and validations leave no trace.

    Attributes:
        signals: Ask the loop to leave after the next step of the optimizer; entered by the program.
    """

    runner: Runner
    dataloader: DataLoader

    def __init__(self, runner: Runner, dataloader: dict[str, Any], **kwargs: Any) -> None:
        # Samplers need the same seed on all processes, whatever randomness.diff_rank_seed says.
        loader = runner.build_dataloader(dataloader, seed=runner.seed)
        endless = isinstance(self, IterBasedTrainLoop)
        super().__init__(runner, exact_loader(loader, runner.seed, get_rank(), endless), **kwargs)
        self.signals = StopSignals()

    @property
    def _showings(self) -> Showings:
        return self.dataloader.batch_sampler

    def _begin(self) -> None:
        """Prepare what needs the whole runner, after a checkpoint was loaded."""
        guard = FiniteGuard(current_process(), collective_device())
        self._steps = GuardedSteps(self.runner.optim_wrapper, guard, self.signals, self._advice)
        self.runner.register_hook(_WatchValidation(self.signals), "VERY_LOW")
        iterations = all_gather_object(self._iter)
        if len(set(iterations)) > 1:
            raise UserError(
                f"the processes go on from different iterations ({', '.join(map(str, iterations))}): all of them must "
                f"see the same files in {self.runner.work_dir}."
            )
        own = {"processes": get_world_size(), "images": (self._showings.batch_size or 1) * get_world_size()}
        found = {"batch": self._batches_done(), "validates": False, **own}
        found |= self.runner.message_hub.runtime_info.get(_POSITION, {})
        differing = [f"{found[key]} {key} instead of {own[key]}" for key in own if found[key] != own[key]]
        if differing:
            self.runner.logger.warning(
                f"the checkpoint is of a run with {', '.join(differing)} for a step: from here on, order and random "
                "numbers are others than they would have been"
            )
        self._position = {**found, **own, "batch": round(found["batch"] * found["images"] / own["images"])}

    def _batches_done(self) -> int:
        """Return the number of the next batch, for checkpoints that do not tell."""
        return 0

    def _advice(self) -> str:
        return (
            f"This was iteration {self._iter + 1}, and the weights are those of before it; checkpoints are in "
            f"{self.runner.work_dir}. Look at the images, lower the learning rate (optim_wrapper.optimizer.lr), or "
            "clip gradients (optim_wrapper.clip_grad)."
        )

    def _keep_position(self, **position: Any) -> None:
        self._position |= position
        self.runner.message_hub.update_info(_POSITION, dict(self._position))

    def _prepare_iteration(self, batch: Any) -> None:
        set_random_seed(seed_from(self.runner.seed, get_rank(), self._iter))
        self._steps.batch = batch

    def _validate(self) -> None:
        self._keep_position(validates=False)
        try:
            self.runner.val_loop.run()
        except StopRequested:
            for hook in self.runner.hooks:
                if isinstance(hook, EMAHook):  # the averaged weights were to be validated
                    hook.after_val_epoch(self.runner)
            self._leave(validates=True)

    def _validate_if_left_out(self) -> None:
        if self._position["validates"] and self.runner.val_loop is not None:
            self._validate()

    def _leave_if_asked(self, validates: Callable[[], bool]) -> None:
        """Leave if that was agreed on before the step just taken; never between steps of the optimizer."""
        if self._steps.leaves:
            self._leave(validates())

    def _leave(self, validates: bool) -> None:
        runner = self.runner
        runner.logger.info(f"asked to leave: saving {RECOVERY} after iteration {self._iter}")
        self._keep_position(validates=validates)
        meta = {"epoch": self._epoch, "iter": self._iter}
        runner.save_checkpoint(runner.work_dir, RECOVERY, meta=meta, by_epoch=False)
        advice = f"; the same command goes on after iteration {self._iter}"
        end_preempted(current_process(), Path(runner.work_dir), advice)


@LOOPS.register_module()
class ExactEpochLoop(_ExactLoop, EpochBasedTrainLoop):
    """mmengine's loop over epochs, but a run that was left goes on exactly, within an epoch too."""

    def run(self) -> nn.Module:
        """Train to the last epoch; return the model."""
        self.runner.call_hook("before_train")
        self._begin()
        self._validate_if_left_out()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            if self._validates_now():
                self._validate()
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        """Train for the rest of an epoch."""
        first = min(self._position["batch"], len(self.dataloader))
        self._showings.start(self._epoch, first)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for number, batch in enumerate(self.dataloader, first):
            self._prepare_iteration(batch)
            self._keep_position(batch=number + 1)
            self.run_iter(number, batch)
            self._leave_if_asked(lambda: False)
        self._keep_position(batch=0)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _validates_now(self) -> bool:
        is_due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        return self.runner.val_loop is not None and self._epoch >= self.val_begin and is_due


@LOOPS.register_module()
class ExactIterLoop(_ExactLoop, IterBasedTrainLoop):
    """mmengine's loop over iterations, but a run that was left goes on exactly, and at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.dataloader_iterator  # nothing was loaded: where to start is not known yet

    def _batches_done(self) -> int:
        return self._iter

    def run(self) -> nn.Module:
        """Train to the last iteration; return the model."""
        self.runner.call_hook("before_train")
        self._begin()
        self.runner.call_hook("before_train_epoch")
        self._showings.start(0, self._position["batch"])
        batches = iter(self.dataloader)
        self._validate_if_left_out()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            batch = next(batches)
            self._prepare_iteration(batch)
            self._keep_position(batch=self._position["batch"] + 1)
            self.run_iter(batch)
            self._decide_current_val_interval()
            self._leave_if_asked(self._validates_now)
            if self._validates_now():
                self._validate()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _validates_now(self) -> bool:
        is_due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
        return self.runner.val_loop is not None and self._iter >= self.val_begin and is_due
