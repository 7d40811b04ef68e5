"""Hooks for mmengine's runner."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mambavision.openmmlab.checkpoints import AtomicLocalBackend
from mambavision.running.folder_lock import FolderLock
from mambavision.running.newest import STARTED

RECOVERY = "recovery.pth"  # written by a run that was asked to stop; exists until its next regular checkpoint


class _DeletesNothing(AtomicLocalBackend):
    """Records the paths that were to be deleted."""

    def __init__(self) -> None:
        super().__init__()
        self.unwanted: list[str] = []

    def remove(self, filepath: str) -> None:
        self.unwanted.append(filepath)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's hook, but nothing is lost if the run is killed at any point.

    First the new checkpoint is completed, then the file ``last_checkpoint`` names it, then old ones are deleted.
    """

    file_backend: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in self.args:  # mmengine would notice at the first checkpoint only
            if name not in inspect.signature(Runner.save_checkpoint).parameters:
                raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}")

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        with self._deleting_afterwards():
            self._keep(runner, step)
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                AtomicLocalBackend().put_text(self.last_ckpt, Path(runner.work_dir, "last_checkpoint"))
        if is_main_process():
            Path(runner.work_dir, RECOVERY).unlink(missing_ok=True)

    def _keep(self, runner: Runner, step: int) -> None:
        """Add a checkpoint to those to keep, and delete the oldest if there are too many."""
        if self.max_keep_ckpts <= 0 or step in [*self.keep_ckpt_ids][-1:]:
            return
        if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
            oldest = self.filename_tmpl.format(self.keep_ckpt_ids.popleft())
            if is_main_process():
                self.file_backend.remove(self.file_backend.join_path(self.out_dir, oldest))
        self.keep_ckpt_ids.append(step)
        runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        with self._deleting_afterwards():
            super()._save_best_checkpoint(runner, metrics)

    @contextlib.contextmanager
    def _deleting_afterwards(self) -> Iterator[None]:
        backend = self.file_backend
        if isinstance(backend, _DeletesNothing):  # saving the best checkpoint also saves the last one
            yield
            return
        self.file_backend = collected = _DeletesNothing()
        try:
            yield
        finally:
            self.file_backend = backend
        best = [getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()]
        for path in collected.unwanted:
            if path not in (self.last_ckpt, *best) and backend.isfile(
                path
            ):  # otherwise it was written again under the same name
                backend.remove(path)


class OwnFolderHook(Hook):
    """Adds the start's number to checkpoints, and prevents writing if the run's folder was deleted.

    Args:
        start: Number of the start, see `mambavision.running.newest.new_start_number`.
        lock: Lock of the folder.
    """

    def __init__(self, start: float, lock: FolderLock) -> None:
        self._start = start
        self._lock = lock

    def before_train(self, runner: Runner) -> None:
        """Add the number after the resumed checkpoint has been restored, which would overwrite it."""
        runner.message_hub.update_info(STARTED, self._start)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._lock.check()
