"""Which run a command goes on with, and where."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import metadata, run
from mambavision import resume
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import CheckpointError
from mambavision.exchange import of_first
from mambavision.launch import Process
from mambavision.preemption import NEVER, finish, goes_on

_logger = logging.getLogger(__name__)

AUTO = "auto"  # a value of --resume, as NEVER is


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


def find(args: argparse.Namespace, process: Process, device: torch.device) -> Resumed | None:
    """Return the checkpoint that a command goes on from, or None if it starts anew; for all processes together.

    A run that was preempted goes on unasked, when the command is the one that it was started by.
    """
    found = _preempted(args) if process.is_first else None
    path, is_unasked = of_first((found and found[0], found is not None), process, device)
    if path is None and args.resume == NEVER:
        if process.is_first:
            for folder in _same_runs(args):
                finish(folder)
        return None
    if path is None and args.resume == AUTO:
        files = run.resumable_checkpoints(args.output, args.tag, args.experiment)
        found = resume.newest_valid(files) if process.is_first else None
        path = of_first(found and found[0], process, device)
        if path is None:
            folder = run.runs_folder(args.output, args.tag) / args.experiment
            _logger.info("nothing to resume in %s: starting anew", folder)
    if path is None and args.resume not in ("", AUTO):
        path = Path(args.resume)
        found = path, read_checkpoint(path, args.trust_checkpoint)
    if path is None:
        return None
    checkpoint = found[1] if found else read_checkpoint(path)
    if checkpoint.get("epoch") is None:
        raise CheckpointError(f"{path}: does not say its epoch; start from its weights with --initial-checkpoint.")
    metadata.check_training(checkpoint, str(path))
    if is_unasked:  # what the options say of resuming was meant for the first start
        _logger.info("resuming %s: its run was preempted (--resume never starts anew)", path)
        return Resumed(path, checkpoint)
    _logger.info("resuming %s", path)
    return Resumed(path, checkpoint, not args.no_resume_opt, args.start_epoch)


def _preempted(args: argparse.Namespace) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint of a preempted run that was started by this command."""
    folders = [folder for folder in _same_runs(args) if goes_on(folder, args.resume) is not None]
    return resume.newest_valid(path for folder in folders for path in run.checkpoints_in(folder))


def _same_runs(args: argparse.Namespace) -> list[Path]:
    settings = run.settings_of(args)
    folders = run.run_folders(args.output, args.tag, args.experiment)
    return [folder for folder in folders if run.read_settings(folder) == settings]
