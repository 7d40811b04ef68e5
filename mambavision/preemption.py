"""Runs that are asked to leave: signals, the mark they leave behind, and their return under Slurm.

A scheduler that wants its machines back sends SIGTERM, or SIGUSR1 where a job asked to be warned (``sbatch --signal``).
A run then finishes its step, writes a checkpoint, marks its folder, asks Slurm to queue the job again and leaves with
`mambavision.errors.PREEMPTED`. The same command goes on from there.
"""

import json
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from mambavision.errors import PREEMPTED, Interruption, OutputError, UserError
from mambavision.files import replacing
from mambavision.launch import Process, any_process, leave

_logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
NEVER = "never"  # what a command says of resuming to start anew
RECORD = "unfinished.json"  # in the folder of a run, until its end
_DEFAULT_REQUEUES = 100
_SLURM_SECONDS = 60  # for an answer of its controller
_LOCK_SECONDS = 120.0
_ECHO_SECONDS = 2.0  # in which a second signal means the same as the first


class Preempted(Interruption):
    """The run has saved its state and leaves, as it was asked to."""

    def __init__(self, advice: str) -> None:
        super().__init__(signal.SIGTERM)
        self.exit_status = PREEMPTED
        self.advice = advice


class AskedToLeaveError(Exception):
    """Ends a validation on all processes: one of them was asked to leave."""


class StopSignals:
    """Takes note of `SIGNALS` while it is entered; one that comes two seconds later or more ends the program at once.

    `received` says whether there was one. Signals that the program ignores stay ignored.

    Raises:
        UserError: On entering, if a variable that matters once there is a signal makes no sense.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, signal.Handlers] = {}
        self._process = os.getpid()
        self._first = 0.0

    def __enter__(self) -> "StopSignals":
        most_requeues()
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if previous != signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if os.getpid() == self._process:
            self._restore()

    def raise_if_received(self, process: Process, device: torch.device) -> None:
        """Raise an AskedToLeaveError if any process has received a signal; to be called on all together."""
        if any_process([self.received], process, device)[0]:
            raise AskedToLeaveError

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = True, now
        if now - self._first < _ECHO_SECONDS:  # torchrun passes on what Slurm has sent to all processes already
            return
        self._restore()
        os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)


def shield_worker(program: int, worker: int) -> None:
    """Let a worker of a data loader outlive `SIGNALS` unless they come from its program, which ends it by SIGTERM.

    Schedulers send signals to whole groups of processes, and the step that the run finishes may still need the
    worker's batches. For ``worker_init_fn``: ``partial(shield_worker, os.getpid())``.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where nobody schedules
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_obey, args=[program], daemon=True).start()


def _obey(program: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != program:
        pass
    os._exit(0)


def leave_preempted(process: Process, folder: Path, advice: str) -> NoReturn:
    """Mark the folder of a run, have its job queued again, and raise `Preempted`.

    To be called on all processes, after the checkpoint is complete. `advice` says how to go on by hand.
    """
    for number in SIGNALS:  # Slurm sends more of them to a job that it queues again
        signal.signal(number, signal.SIG_IGN)
    if process.is_first:
        try:
            mark(folder)
        except OutputError as error:  # the checkpoint is there, and a job that is queued again knows its run
            _logger.warning("%s", error)
        if requeue(process):
            advice = "; the job is queued again"
    leave(process)  # only now: srun ends the other processes of a step as soon as one has failed
    raise Preempted(advice)


def begin(
    folder: Path,
    resume: str,
    is_new: bool,
    environment: Mapping[str, str] = os.environ,
    number: float | None = None,
) -> None:
    """Note in the folder of a run how it was started, for `goes_on`.

    Args:
        folder: Where it writes.
        resume: What its command says of resuming.
        is_new: Or does it go on with what is there?
        number: Of this start, see `mambavision.resume.number_of_start`; by default the time.
    """
    before = {} if is_new else _record(folder)
    first = time.time() if number is None else number
    _write(folder, {"resume": resume, "preempted": False, "first": first} | before | {"job": _job(environment)})


def mark(folder: Path) -> None:
    """Note that a run was preempted."""
    _write(folder, _record(folder) | {"preempted": True})


def finish(folder: Path) -> None:
    """Forget what `begin` and `mark` have noted: the run has come to its end, or a new one takes its place."""
    (folder / RECORD).unlink(missing_ok=True)


def goes_on(folder: Path, resume: str, environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the number of the first start of the run in a folder, if a command goes on with it unasked, or None.

    It does if Slurm has restarted the job that the run belongs to, whatever the command says of resuming: that was for
    the job's first start. Otherwise if the run was preempted, unless the command asks for something else than before.

    Args:
        folder: Of a run.
        resume: What the command says of resuming; empty for nothing.

    Returns:
        Checkpoints of starts with smaller numbers are not of this run. 0 for runs of versions without numbers.
    """
    record = _record(folder)
    is_same_job = _restarts(environment) > 0 and record.get("job") == _job(environment)
    is_same_command = record.get("preempted") and resume in ("", record.get("resume")) and resume != NEVER
    return record.get("first", 0.0) if is_same_job or is_same_command else None


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    with replacing(folder / RECORD) as file:
        file.write(json.dumps(record).encode())


def patience(environment: Mapping[str, str] = os.environ) -> float:
    """Return how many seconds a start waits for an earlier one to let go of the run's folder.

    Slurm also restarts jobs whose machine has died, and a file server keeps the locks of a dead machine for a while.
    """
    return _LOCK_SECONDS if _restarts(environment) > 0 else 0.0


def _job(environment: Mapping[str, str]) -> str:
    return environment.get("SLURM_JOB_ID", "")


def _restarts(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def requeue(process: Process, environment: Mapping[str, str] = os.environ) -> bool:
    """Let Slurm queue the job of this process again; return whether it will.

    Only the first process asks. MAX_REQUEUES in the environment limits how often (default 100), so that a run that
    never gets far does not go round for ever. Only a job that still runs is queued again: one that is being ended was
    cancelled, or has come to its time limit without a warning, or was preempted by Slurm, which brings it back itself.
    """
    job = environment.get("SLURM_JOB_ID")
    if not process.is_first or job is None:
        return False
    limit = most_requeues(environment)
    if _restarts(environment) >= limit:
        _logger.warning("job %s was queued again %d times, and MAX_REQUEUES is %d: not again", job, limit, limit)
        return False
    try:
        state = _state(job)
        if state != "RUNNING":
            _logger.info("job %s is being ended by Slurm (%s): not queued again", job, state)
            return False
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        _logger.warning("Slurm does not queue job %s again (%s): start it by hand", job, reason)
        return False
    _logger.info("job %s is queued again", job)
    return True


def most_requeues(environment: Mapping[str, str] = os.environ) -> int:
    """Return how often a job may be queued again.

    Raises:
        UserError: MAX_REQUEUES is not a number.
    """
    value = environment.get("MAX_REQUEUES") or str(_DEFAULT_REQUEUES)
    if not value.isdecimal():
        raise UserError(f"MAX_REQUEUES={value}: the variable must be a number from 0 on, or unset.")
    return int(value)


def _state(job: str) -> str:
    """``... JobState=RUNNING Reason=...`` -> RUNNING"""
    found = re.search(r"\bJobState=(\w+)", _scontrol("show", "job", job))
    return found[1] if found else ""


def _scontrol(*words: str) -> str:
    answer = subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True, timeout=_SLURM_SECONDS)
    return answer.stdout
