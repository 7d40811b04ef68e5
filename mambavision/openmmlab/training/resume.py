"""Resuming a training of mmengine: the checkpoint to start from, and the record of the run."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine import Config
from mmengine.dist import is_main_process

from mambavision.checkpoint import read_outline
from mambavision.errors import CheckpointError
from mambavision.files import remove_temporaries
from mambavision.openmmlab.checkpoints import load_from_local
from mambavision.openmmlab.training.hooks import RECOVERY
from mambavision.running.newest import STARTED, Position, new_start_number, newest_valid, number
from mambavision.running.record import AUTO, NEVER, begin, finish, should_resume

_logger = logging.getLogger(__name__)


def requested(config: Config, resume: str | None) -> str:
    """Return ``--resume`` or, without it, the config's own setting in mmengine's style; empty for nothing."""
    if resume is None and config.get("resume"):
        return config.get("load_from") or AUTO
    return resume or ""


def find(work_dir: Path, resume: str) -> tuple[str, dict[str, Any]] | None:
    """Return path and content of the checkpoint to resume, or None.

    Args:
        work_dir: Folder of the run.
        resume: The requested checkpoint, see `requested`.
    """
    found = _preempted(work_dir, resume)
    if found is None and resume in ("", NEVER):
        return None
    if found is None:
        folder = work_dir if resume == AUTO else Path(resume)
        is_file = resume != AUTO and not folder.is_dir()
        found = (folder, load_from_local(str(folder))) if is_file else newest_valid(_checkpoints(folder), _position)
    if found is None:
        _logger.warning("nothing to resume in %s: starting a new training", folder)
        return None
    path, content = found
    missing = {"meta", "state_dict", "optimizer", "message_hub"} - content.keys()
    if missing:
        raise CheckpointError(
            f"{path}: contains no training state to resume ({', '.join(sorted(missing))} missing); to start from "
            f"its weights, use --cfg-options load_from={path}."
        )
    _logger.info("resuming from %s", path)
    return str(path), content


def _preempted(work_dir: Path, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint of a preempted run that is resumed automatically, and its content."""
    first_start = should_resume(work_dir, resume)
    if first_start is None:
        return None
    found = newest_valid(_checkpoints(work_dir), _position, first_start)
    if found is not None:
        _logger.info("this run was preempted and is resumed; to start a new one, give --resume never")
    return found


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a training, the one of a preempted run first."""
    found = [*folder.glob(RECOVERY), *folder.glob("epoch_*.pth"), *folder.glob("iter_*.pth")]
    pointer = folder / "last_checkpoint"
    last = Path(pointer.read_text(encoding="utf-8").strip()) if pointer.is_file() else None
    if last is not None and last.is_file() and last.parent.resolve() != folder.resolve():  # a hook's out_dir
        found.append(last)
    return found


def _position(checkpoint: Mapping[str, Any]) -> Position:
    """Return the start that wrote a checkpoint, its epoch, and its iteration."""
    info = _mapping(_mapping(checkpoint.get("message_hub")).get("runtime_info"))
    meta = _mapping(checkpoint.get("meta"))
    return number(info.get(STARTED)), number(meta.get("epoch")), number(meta.get("iter"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def begin_record(work_dir: Path, resume: str, is_new: bool) -> float:
    """Clean up after a killed run, record the start, and return its number; on the first process only.

    A new run also deletes the checkpoint that a preempted one has left.
    """
    if not is_main_process():
        return 0.0
    outlines = map(read_outline, _checkpoints(work_dir))
    start = new_start_number(_position(outline) for outline in outlines if outline is not None)
    remove_temporaries(work_dir)
    if is_new:
        (work_dir / RECOVERY).unlink(missing_ok=True)
    # Files of an earlier run are not part of a run that resumes a file by name; they may be of later iterations.
    is_from_file = resume not in ("", AUTO, NEVER) and should_resume(work_dir, resume) is None
    begin(work_dir, resume, is_new or is_from_file, start_number=start)
    return start


def end_record(work_dir: Path) -> None:
    """Delete the record of a complete run."""
    if is_main_process():
        finish(work_dir)
        (work_dir / RECOVERY).unlink(missing_ok=True)
