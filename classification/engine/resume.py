"""Resuming a run: choosing the checkpoint, and the position to start from."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import metadata, run_folder
from engine.options import TrainOptions
from engine.options.train import RunOptions
from engine.remedies import naming_flags
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import CheckpointError, UserError
from mambavision.running.folder_lock import FolderLock
from mambavision.running.group import Group
from mambavision.running.newest import newest_valid
from mambavision.running.record import AUTO, NEVER, finish, should_resume
from mambavision.running.slurm import lock_patience

_logger = logging.getLogger(__name__)

Found = tuple[Path, dict[str, Any]]  # a checkpoint file and its content


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a run resumes."""

    path: Path
    checkpoint: dict[str, Any]
    with_optimizer: bool = True  # False: the weights only
    start_epoch: int | None = None  # instead of the checkpoint's

    @property
    def folder(self) -> Path | None:
        """The folder of the run, or None if the file is not in one."""
        return run_folder.folder_of(self.path)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Options of the run; empty if unknown."""
        return settings_in(self.checkpoint)

    def position(self, batching: Mapping[str, Any], is_stream: bool) -> tuple[int, int]:
        """Return the epoch and batch to start from.

        An interrupted epoch is repeated if its batches (see `Trainer._batching`) have changed, or can only be read from
        the beginning.
        """
        if self.start_epoch is not None:
            return self.start_epoch, 0
        epoch, next_batch = self.checkpoint["epoch"], self.checkpoint.get("next_batch")
        if next_batch is None:  # the epoch is complete
            return epoch + 1, 0
        if not is_stream and self.checkpoint.get("batching") == batching:
            return epoch, next_batch
        _logger.warning("epoch %d is repeated: its batches have changed since the interruption", epoch)
        return epoch, 0


def settings_in(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options with which a checkpoint was trained; empty if unknown."""
    settings = checkpoint.get("args") or {}  # timm and the originals save a namespace
    return settings if isinstance(settings, dict) else vars(settings)


@naming_flags(training=True)
def find(options: TrainOptions, group: Group, lock: FolderLock | None = None) -> Resumed | None:
    """Return the checkpoint that a command resumes, or None if it starts a new run; collective.

    The command that started a preempted run resumes it automatically. Among several runs with the same tag,
    ``--resume auto`` selects the one that was started or resumed last, and its newest readable checkpoint by epoch and
    batch.

    Args:
        options: Options of train.py.
        group: All processes.
        lock: Locks the folder of the run before a checkpoint in it is selected; without it, nothing is written.

    Raises:
        CheckpointError: The checkpoint cannot be read, or lacks its epoch.
        UserError: Another process is training the run.
    """
    found: Found | None = None

    def choose() -> tuple[Path | None, bool]:
        nonlocal found
        found, is_automatic = _choose(options, lock)
        return found and found[0], is_automatic

    resume = options.model.resume
    path, is_automatic = group.call_on_first(choose)
    if path is None:
        if resume == AUTO:
            folder = run_folder.runs_folder(options.run.output, options.run.tag) / options.run.experiment
            _logger.info("nothing to resume in %s: starting a new run", folder)
        return None
    is_named = not is_automatic and resume != AUTO
    checkpoint = found[1] if found else read_checkpoint(path, is_named and options.model.trust_checkpoint)
    if checkpoint.get("epoch") is None:
        raise CheckpointError(f"{path}: does not contain its epoch; start from its weights with --initial-checkpoint.")
    metadata.check_training(checkpoint, str(path))
    if is_automatic:  # --no-resume-opt and --start-epoch were for the first start
        _logger.info("resuming %s: its run was preempted (--resume never starts a new run)", path)
        return Resumed(path, checkpoint)
    _logger.info("resuming %s", path)
    return Resumed(path, checkpoint, not options.model.no_resume_opt, options.schedule.start_epoch)


def _choose(options: TrainOptions, lock: FolderLock | None) -> tuple[Found | None, bool]:
    """Return path and content of the checkpoint to resume, and True if its run is resumed automatically."""
    resume = options.model.resume
    preempted = [folder for folder in _same_runs(options) if should_resume(folder, resume) is not None]
    if (found := _newest(preempted, lock)) is not None:
        return found, True
    if resume == AUTO:
        return _newest(_run_folders(options.run), lock), False
    if resume in ("", NEVER):
        return None, False
    path = Path(resume)
    if lock is not None and (folder := run_folder.folder_of(path)) is not None:
        lock.acquire(folder, "or resume from a copy of the file", patience=lock_patience())
    return (path, read_checkpoint(path, options.model.trust_checkpoint)), False


def _newest(folders: Iterable[Path], lock: FolderLock | None) -> Found | None:
    """Return the newest checkpoint of the newest run with one, and lock the folder of that run."""
    newest_first = sorted(folders, key=lambda folder: (run_folder.position_of(folder), folder.name), reverse=True)
    advice = "or name another run with --experiment or --resume FILE"
    for folder in newest_first:
        if lock is not None and run_folder.checkpoints_in(folder):
            lock.acquire(folder, advice, patience=lock_patience())
        found = newest_valid(run_folder.checkpoints_in(folder))
        if found is not None:
            return found
        if lock is not None:
            lock.release()
    return None


def forget_preempted(options: TrainOptions, own: Path) -> None:
    """Prevent the automatic resumption of preempted runs of the same command, as a new run in `own` replaces them."""
    for folder in _same_runs(options):
        if folder != own:
            try:
                with FolderLock() as lock:
                    lock.acquire(folder, "or leave it alone")
                    finish(folder)
            except UserError as error:
                _logger.warning("will still be resumed automatically: %s", error)


def _same_runs(options: TrainOptions) -> list[Path]:
    settings = run_folder.settings_of(options)
    return [folder for folder in _run_folders(options.run) if run_folder.read_settings(folder) == settings]


def _run_folders(options: RunOptions) -> list[Path]:
    return run_folder.run_folders(options.output, options.tag, options.experiment)
