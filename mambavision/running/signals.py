"""Graceful shutdown on the signals of schedulers.

A scheduler that needs its machines back sends SIGTERM, or SIGUSR1 if the job asked for a warning (``sbatch --signal``).
The run then finishes its step, writes a checkpoint, marks its folder, has Slurm requeue the job and exits with
`mambavision.errors.PREEMPTED`. The same command resumes it.
"""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mambavision.errors import OutputError, Preempted
from mambavision.running import record
from mambavision.running.group import Group
from mambavision.running.process import STOP_SIGNALS
from mambavision.running.slurm import max_requeues, requeue

_logger = logging.getLogger(__name__)

_ECHO_SECONDS = 2.0  # a second signal within this time means the same as the first


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """Ends a validation on all processes because one of them was asked to stop."""


class StopSignals:
    """Context manager that records `STOP_SIGNALS`; one more, two seconds or later, ends the program at once.

    Signals that the program ignores stay ignored.

    Attributes:
        received: True once a signal has arrived.

    Raises:
        UserError: On entering, if a variable that is needed after a signal is invalid.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}  # handlers
        self._process = os.getpid()
        self._first = 0.0

    def __enter__(self) -> "StopSignals":
        max_requeues()
        for number in STOP_SIGNALS:
            previous = signal.getsignal(number)
            if previous != signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if os.getpid() == self._process:
            self._restore()

    def raise_if_received(self, group: Group) -> None:
        """Raise StopRequested if any process has received a signal; collective."""
        if group.any([self.received])[0]:
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = True, now
        if now - self._first < _ECHO_SECONDS:  # torchrun forwards what Slurm has already sent to all processes
            return
        self._restore()
        os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)


def shield_worker(program: int, worker: int) -> None:
    """Make a data loader worker ignore `STOP_SIGNALS`, except from its program, which ends workers by SIGTERM.

    Schedulers signal whole process groups, and the step that the run finishes may still need the worker's batches. For
    ``worker_init_fn``: ``partial(shield_worker, os.getpid())``.
    """
    if hasattr(signal, "sigwaitinfo"):  # missing on macOS, which has no schedulers
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=_obey, args=[program], daemon=True).start()


def _obey(program: int) -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != program:
        pass
    os._exit(0)


def end_preempted(group: Group, folder: Path, advice: str) -> NoReturn:
    """Mark the folder of a run as preempted, requeue its job, and raise `Preempted`; collective.

    To be called after the checkpoint is complete.

    Args:
        group: All processes of the run.
        folder: Folder of the run.
        advice: Advice on resuming manually, for the message.
    """
    for number in STOP_SIGNALS:  # Slurm sends more of them to a job that it requeues
        signal.signal(number, signal.SIG_IGN)
    if group.is_first:
        try:
            record.mark_preempted(folder)
        except OutputError as error:  # the checkpoint is complete, and a requeued job recognises its run
            _logger.warning("%s", error)
        if requeue(group.process):
            advice = "; the job has been requeued"
    group.leave()  # only now: srun ends the other processes of a step as soon as one has failed
    raise Preempted(advice)
