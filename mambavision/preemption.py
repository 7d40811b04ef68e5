"""Runs that are asked to leave: signals, the mark they leave behind, and their return under Slurm.

A scheduler that wants its machines back sends SIGTERM, or SIGUSR1 where a job asked to be warned (``sbatch --signal``).
A run then finishes its step, writes a checkpoint, marks its folder, asks Slurm to queue the job again and leaves with
`mambavision.errors.PREEMPTED`. The same command goes on from there.
"""

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
from typing import NoReturn

from mambavision.checkpoint import replacing
from mambavision.errors import PREEMPTED, Interruption
from mambavision.launch import Process, leave

_logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_MARK = "preempted"
_DEFAULT_REQUEUES = 100
_SLURM_SECONDS = 60  # for an answer of its controller
_ECHO_SECONDS = 2.0  # in which a second signal means the same as the first


class Preempted(Interruption):
    """The run has saved its state and leaves, as it was asked to."""

    def __init__(self, advice: str) -> None:
        super().__init__(signal.SIGTERM)
        self.exit_status = PREEMPTED
        self.advice = advice


class StopSignals:
    """Takes note of `SIGNALS` while it is entered; a later one ends the program at once, as without this class.

    `received` says whether there was one. Signals that the program ignores stay ignored.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, signal.Handlers] = {}
        self._process = os.getpid()
        self._first = 0.0

    def __enter__(self) -> "StopSignals":
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if previous != signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if os.getpid() == self._process:
            self._restore()

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


def shield_worker(worker: int) -> None:
    """Let a worker of a data loader outlive `SIGNALS` unless they come from its program.

    A `worker_init_fn`. Schedulers send signals to whole groups of processes, and the step that the run finishes may
    still need the worker's batches. The program ends its workers by SIGTERM.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey, args=[os.getppid()], daemon=True).start()


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
        mark(folder)
        if requeue(process):
            advice = "; the job is queued again"
    leave(process)  # only now: srun ends the other processes of a step as soon as one has failed
    raise Preempted(advice)


def mark(folder: Path) -> None:
    """Say in the folder of a run that it was preempted, for `goes_on`."""
    with replacing(folder / _MARK) as file:
        file.write(b"Preempted: the same command goes on from the newest checkpoint here.\n")


def unmark(folder: Path) -> None:
    """Take back `mark`: the run has come to its end, or a new one starts in its place."""
    (folder / _MARK).unlink(missing_ok=True)


def goes_on(folder: Path, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a run in this folder goes on unasked: it was preempted, or Slurm restarted the job."""
    return (folder / _MARK).exists() or _restarts(environment) > 0


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
    limit = int(environment.get("MAX_REQUEUES") or _DEFAULT_REQUEUES)
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


def _state(job: str) -> str:
    """``... JobState=RUNNING Reason=...`` -> RUNNING"""
    found = re.search(r"\bJobState=(\w+)", _scontrol("show", "job", job))
    return found[1] if found else ""


def _scontrol(*words: str) -> str:
    answer = subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True, timeout=_SLURM_SECONDS)
    return answer.stdout
