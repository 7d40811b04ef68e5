"""Which run a command goes on with, and where."""

import argparse
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import metadata, run
from mambavision import resume
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import CheckpointError, UserError
from mambavision.exchange import by_first
from mambavision.launch import Process
from mambavision.locking import FolderLock
from mambavision.preemption import NEVER, finish, goes_on, patience

_logger = logging.getLogger(__name__)

AUTO = "auto"  # a value of --resume, as NEVER is

Found = tuple[Path, dict[str, Any]]  # a checkpoint file and its content


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from."""

    path: Path
    checkpoint: dict[str, Any]
    with_optimizer: bool = True  # or the weights only
    start_epoch: int | None = None  # instead of the checkpoint's

    @property
    def folder(self) -> Path | None:
        """The folder of its run, or None if the file lies elsewhere now."""
        return run.folder_of(self.path)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Options of the run; empty if the file does not have them."""
        return settings_in(self.checkpoint)

    def position(self, batching: Mapping[str, Any], is_stream: bool) -> tuple[int, int]:
        """Return the epoch and the batch to begin with.

        An interrupted epoch starts over if its batches (see `batching` of the trainer) are no longer the same, or can
        be read from their beginning only.
        """
        if self.start_epoch is not None:
            return self.start_epoch, 0
        epoch, next_batch = self.checkpoint["epoch"], self.checkpoint.get("next_batch")
        if next_batch is None:  # it was finished
            return epoch + 1, 0
        if not is_stream and self.checkpoint.get("batching") == batching:
            return epoch, next_batch
        _logger.warning("epoch %d starts over: its batches are not those it was interrupted in", epoch)
        return epoch, 0


def settings_in(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = checkpoint.get("args") or {}  # timm and the originals save a namespace
    return settings if isinstance(settings, dict) else vars(settings)


def find(
    args: argparse.Namespace, process: Process, device: torch.device, lock: FolderLock | None = None
) -> Resumed | None:
    """Return the checkpoint that a command goes on from, or None if it starts anew; for all processes together.

    A run that was preempted goes on unasked, when the command is the one that it was started by. Of several runs of a
    tag, ``--resume auto`` takes the one that was started or resumed last, and of its checkpoints that can be read the
    one of the latest epoch and batch.

    Args:
        lock: Takes the folder of the run, before a checkpoint in it is chosen. Without it, nothing is to be written.

    Raises:
        UserError: The run is still training.
    """
    found: Found | None = None

    def choose() -> tuple[Path | None, bool]:
        nonlocal found
        found, is_unasked = _choose(args, lock)
        return found and found[0], is_unasked

    path, is_unasked = by_first(choose, process, device)
    if path is None:
        if args.resume == AUTO:
            folder = run.runs_folder(args.output, args.tag) / args.experiment
            _logger.info("nothing to resume in %s: starting anew", folder)
        return None
    is_named = not is_unasked and args.resume != AUTO
    checkpoint = found[1] if found else read_checkpoint(path, is_named and args.trust_checkpoint)
    if checkpoint.get("epoch") is None:
        raise CheckpointError(f"{path}: does not say its epoch; start from its weights with --initial-checkpoint.")
    metadata.check_training(checkpoint, str(path))
    if is_unasked:  # what the options say of resuming was meant for the first start
        _logger.info("resuming %s: its run was preempted (--resume never starts anew)", path)
        return Resumed(path, checkpoint)
    _logger.info("resuming %s", path)
    return Resumed(path, checkpoint, not args.no_resume_opt, args.start_epoch)


def _choose(args: argparse.Namespace, lock: FolderLock | None) -> tuple[Found | None, bool]:
    """Return path and content of the checkpoint to go on from, and whether its run goes on unasked."""
    preempted = [folder for folder in _same_runs(args) if goes_on(folder, args.resume) is not None]
    if (found := _newest(preempted, lock)) is not None:
        return found, True
    if args.resume == AUTO:
        return _newest(run.run_folders(args.output, args.tag, args.experiment), lock), False
    if args.resume in ("", NEVER):
        return None, False
    path = Path(args.resume)
    if lock is not None and (folder := run.folder_of(path)) is not None:
        lock.acquire(folder, "or resume from a copy of the file", patience=patience())
    return (path, read_checkpoint(path, args.trust_checkpoint)), False


def _newest(folders: Iterable[Path], lock: FolderLock | None) -> Found | None:
    """Return the newest checkpoint of the newest run that has one, and take the folder of that run."""
    newest_first = sorted(folders, key=lambda folder: (run.position_of(folder), folder.name), reverse=True)
    for folder in newest_first:
        if lock is not None and run.checkpoints_in(folder):
            lock.acquire(folder, "or name another run with --experiment or --resume FILE", patience=patience())
        found = resume.newest_valid(run.checkpoints_in(folder))
        if found is not None:
            return found
        if lock is not None:
            lock.release()
    return None


def forget_preempted(args: argparse.Namespace, own: Path) -> None:
    """Let preempted runs of this command, in the place of which one in `own` starts, not go on unasked any more."""
    for folder in _same_runs(args):
        if folder != own:
            try:
                with FolderLock() as lock:
                    lock.acquire(folder, "or let it be")
                    finish(folder)
            except UserError as error:
                _logger.warning("goes on unasked as before: %s", error)


def _same_runs(args: argparse.Namespace) -> list[Path]:
    settings = run.settings_of(args)
    folders = run.run_folders(args.output, args.tag, args.experiment)
    return [folder for folder in folders if run.read_settings(folder) == settings]
