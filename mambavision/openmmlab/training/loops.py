"""Training loops for mmengine's runner that can stop after any step and resume exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.dist import all_gather_object, broadcast, get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner, set_random_seed
from torch import nn
from torch.utils.data import DataLoader

from mambavision.errors import UserError
from mambavision.openmmlab.training.batches import ViewBatches, exact_loader
from mambavision.openmmlab.training.guarded_steps import GuardedSteps, current_group
from mambavision.openmmlab.training.hooks import RECOVERY
from mambavision.running.finite import FiniteGuard
from mambavision.running.random_state import seed_from
from mambavision.running.signals import StopRequested, StopSignals, end_preempted

_POSITION = "position"  # in mmengine's message hub, which is part of every checkpoint


class _WatchValidation(Hook):
    """Interrupts a validation if any process was asked to stop, unless accumulated gradients would be lost.

    Also broadcasts the buffers of rank 0, which are those in the checkpoint, so that all processes validate the same
    model: batch norms that are not synchronised differ between processes.
    """

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self._common = 0

    def before_val_epoch(self, runner: Runner) -> None:
        """Determine how many batches all processes have: some may have one more than others."""
        for buffer in runner.model.buffers():
            broadcast(buffer)
        group = current_group()
        batches = torch.tensor(len(runner.val_loop.dataloader), device=group.device)
        if group.is_distributed:
            torch.distributed.all_reduce(batches, torch.distributed.ReduceOp.MIN)
        self._common = int(batches)

    def after_val_iter(self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        if batch_idx < self._common and runner.optim_wrapper.should_update():
            self._signals.raise_if_received(current_group())


class _ExactLoop(BaseLoop):
    """Common part of both loops.

    The random numbers of a sample depend on seed, process, epoch and sample only, those of the main process (dropout,
    choice of boxes) on seed, process and iteration. Therefore no random state has to be saved, a run can resume from a
    checkpoint of any iteration, and validation does not affect training.

    Attributes:
        signals: Requests to stop after the next optimizer step; entered by the program.
    """

    runner: Runner
    dataloader: DataLoader

    def __init__(self, runner: Runner, dataloader: dict[str, Any], **kwargs: Any) -> None:
        # Samplers need the same seed on all processes, whatever randomness.diff_rank_seed is.
        loader = runner.build_dataloader(dataloader, seed=runner.seed)
        endless = isinstance(self, IterBasedTrainLoop)
        super().__init__(runner, exact_loader(loader, runner.seed, get_rank(), endless), **kwargs)
        self.signals = StopSignals()

    @property
    def _views(self) -> ViewBatches:
        views = self.dataloader.batch_sampler
        assert isinstance(views, ViewBatches)
        return views

    def _begin(self) -> None:
        """Prepare the parts that need the complete runner, after a checkpoint was loaded."""
        guard = FiniteGuard(current_group())
        self._steps = GuardedSteps(self.runner.optim_wrapper, guard, self.signals, self._advice)
        self.runner.register_hook(_WatchValidation(self.signals), "VERY_LOW")
        iterations = all_gather_object(self._iter)
        if len(set(iterations)) > 1:
            raise UserError(
                f"the processes resume from different iterations ({', '.join(map(str, iterations))}): all of them must "
                f"see the same files in {self.runner.work_dir}."
            )
        own = {"processes": get_world_size(), "images": (self._views.batch_size or 1) * get_world_size()}
        found = {"batch": self._batches_done(), "validates": False, **own}
        found |= self.runner.message_hub.runtime_info.get(_POSITION, {})
        differing = [f"{found[key]} {key} instead of {own[key]}" for key in own if found[key] != own[key]]
        if differing:
            self.runner.logger.warning(
                f"the checkpoint belongs to a run with {', '.join(differing)} per step: from here on, order and random "
                "numbers differ from those of that run"
            )
        self._position = {**found, **own, "batch": round(found["batch"] * found["images"] / own["images"])}

    def _batches_done(self) -> int:
        """Return the number of the next batch, for checkpoints without a position."""
        return 0

    def _advice(self) -> str:
        return (
            f"This was iteration {self._iter + 1}, and the weights are still those before it; checkpoints are in "
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
                if isinstance(hook, EMAHook):  # restores the weights, which were swapped for the averaged ones
                    hook.after_val_epoch(self.runner)
            self._stop(validates=True)

    def _validate_if_left_out(self) -> None:
        if self._position["validates"] and self.runner.val_loop is not None:
            self._validate()

    def _stop_if_asked(self, validates: Callable[[], bool]) -> None:
        """Stop if any process had been asked to before the last step; never while gradients accumulate."""
        if self._steps.must_stop:
            self._stop(validates())

    def _stop(self, validates: bool) -> None:
        runner = self.runner
        runner.logger.info(f"asked to stop: saving {RECOVERY} after iteration {self._iter}")
        self._keep_position(validates=validates)
        meta = {"epoch": self._epoch, "iter": self._iter}
        runner.save_checkpoint(runner.work_dir, RECOVERY, meta=meta, by_epoch=False)
        advice = f"; the same command resumes after iteration {self._iter}"
        end_preempted(current_group(), Path(runner.work_dir), advice)


@LOOPS.register_module()
class ExactEpochLoop(_ExactLoop, EpochBasedTrainLoop):
    """Epoch-based training loop that resumes exactly, even within an epoch."""

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
        self._views.start(self._epoch, first)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for number, batch in enumerate(self.dataloader, first):
            self._prepare_iteration(batch)
            self._keep_position(batch=number + 1)
            self.run_iter(number, batch)
            self._stop_if_asked(lambda: False)
        self._keep_position(batch=0)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _validates_now(self) -> bool:
        is_due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        return self.runner.val_loop is not None and self._epoch >= self.val_begin and is_due


@LOOPS.register_module()
class ExactIterLoop(_ExactLoop, IterBasedTrainLoop):
    """Iteration-based training loop that resumes exactly, without reading skipped batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.dataloader_iterator  # nothing was loaded yet, because the start is not known

    def _batches_done(self) -> int:
        return self._iter

    def run(self) -> nn.Module:
        """Train to the last iteration; return the model."""
        self.runner.call_hook("before_train")
        self._begin()
        self.runner.call_hook("before_train_epoch")
        self._views.start(0, self._position["batch"])
        batches = iter(self.dataloader)
        self._validate_if_left_out()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            batch = next(batches)
            self._prepare_iteration(batch)
            self._keep_position(batch=self._position["batch"] + 1)
            self.run_iter(batch)
            self._decide_current_val_interval()
            self._stop_if_asked(self._validates_now)
            if self._validates_now():
                self._validate()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _validates_now(self) -> bool:
        is_due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
        return self.runner.val_loop is not None and self._iter >= self.val_begin and is_due
