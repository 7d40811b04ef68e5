"""Hooks for mmengine's runner."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import CheckpointHook
from mmengine.registry import FUNCTIONS, HOOKS
from mmengine.runner import Runner, set_random_seed

from mambavision.openmmlab.checkpoints import AtomicLocalBackend


def set_random_states(runner: Runner, step: int) -> None:
    """Set random states that depend on the run's seed, an epoch or iteration, and the process's rank alone."""
    set_random_seed((runner.seed + step * 1_000_003 + get_rank() * 7919) % 2**32)


class _DeletesNothing(AtomicLocalBackend):
    """Keeps the paths that were to be deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.unwanted: list[str] = []

    def remove(self, filepath: str) -> None:
        self.unwanted.append(filepath)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's hook, but old checkpoints are deleted after the new one is complete, and epochs can be repeated.

    mmengine saves no random states. Here every epoch starts from random states that depend on seed, epoch and rank
    alone, so that a run resumed after an epoch continues as if it had not been interrupted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in self.args:  # mmengine finds out when it saves the first time
            if name not in inspect.signature(Runner.save_checkpoint).parameters:
                raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}")

    def before_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch:
            set_random_states(runner, runner.epoch)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        with self._deleting_afterwards():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        with self._deleting_afterwards():
            super()._save_best_checkpoint(runner, metrics)

    @contextlib.contextmanager
    def _deleting_afterwards(self) -> Iterator[None]:
        backend = self.file_backend
        if isinstance(backend, _DeletesNothing):  # the best checkpoint saves the last one along with it
            yield
            return
        self.file_backend = collected = _DeletesNothing()
        try:
            yield
        finally:
            self.file_backend = backend
        best = [getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()]
        for path in collected.unwanted:
            if path not in (self.last_ckpt, *best):  # written again under the same name
                backend.remove(path)


@FUNCTIONS.register_module()
def seed_workers_by_epoch(worker_id: int) -> None:
    """Leave the seeds of a data loader's worker as PyTorch set them, different in each epoch.

    mmengine's own function gives workers that start with each epoch the same augmentations in all of them.
    """
