"""Record of an unfinished run, kept in its folder so that the same command can resume it."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambavision.files import replacing
from mambavision.running.slurm import job_id, restarts

AUTO, NEVER = "auto", "never"  # values of --resume: resume the newest checkpoint, or start a new run
RECORD = "unfinished.json"  # in the folder of a run until its end


def begin(
    folder: Path,
    resume: str,
    is_new: bool,
    environment: Mapping[str, str] = os.environ,
    start_number: float | None = None,
) -> None:
    """Record in the folder of a run how it was started, for `should_resume`.

    Args:
        folder: Folder of the run.
        resume: The command's ``--resume``.
        is_new: False if the run resumes what is in the folder.
        environment: Environment of the process.
        start_number: Number of this start, see `mambavision.running.newest.new_start_number`; default: the time.
    """
    before = {} if is_new else _read(folder)
    first = time.time() if start_number is None else start_number
    _write(folder, {"resume": resume, "preempted": False, "first": first} | before | {"job": job_id(environment)})


def mark_preempted(folder: Path) -> None:
    """Record that a run was preempted."""
    _write(folder, _read(folder) | {"preempted": True})


def finish(folder: Path) -> None:
    """Delete the record: the run is complete, or a new one replaces it."""
    (folder / RECORD).unlink(missing_ok=True)


def should_resume(folder: Path, resume: str, environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the number of the first start of the run in a folder if a command resumes it automatically, or None.

    A command resumes a run if Slurm has restarted the job of that run, regardless of ``--resume``, which applied to the
    first start of the job. Otherwise it resumes a preempted run unless its ``--resume`` has changed.

    Args:
        folder: Folder of a run.
        resume: The command's ``--resume``; empty for nothing.
        environment: Environment of the process.

    Returns:
        Checkpoints of starts with smaller numbers do not belong to this run. 0 for runs of versions without numbers.
    """
    record = _read(folder)
    is_same_job = restarts(environment) > 0 and record.get("job") == job_id(environment)
    is_same_command = record.get("preempted") and resume in ("", record.get("resume")) and resume != NEVER
    return record.get("first", 0.0) if is_same_job or is_same_command else None


def _read(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    with replacing(folder / RECORD) as file:
        file.write(json.dumps(record).encode())
