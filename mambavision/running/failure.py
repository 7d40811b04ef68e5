"""Failure handling across processes: if one fails, all exit, and the first error is printed last.

The processes share a store, in which the first to fail records its rank and exit status. The others fail a moment
later, because the connection to it is lost, or wait in a collective that never ends: they end too, without printing
anything.
"""

import atexit
import json
import os
import signal
import sys
import threading
import time
from typing import NoReturn

import torch.distributed

from mambavision.errors import Interruption
from mambavision.running.process import STOP_SIGNALS

_KEY = "first failure"
_FIRST_RANK_SECONDS = 10.0
_POLL_SECONDS = 1.0
_LINGER_SECONDS = 2.5  # for the process that keeps the store, while the others poll it
_LATER_SECONDS = 1.0
_GRACE_SECONDS = 20.0  # for a process to end by itself after another has failed


class _Watch:
    """The shared store, and a thread that ends this process some time after another has failed."""

    def __init__(self, store: torch.distributed.Store, rank: int) -> None:
        self.rank = rank
        self._store = store
        self._first: tuple[int, int] | None = None  # rank and exit status of the first to fail, once known
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._wait, name="watch for failures", daemon=True)
        self._thread.start()

    def claim(self, status: int) -> tuple[bool, int]:
        """Claim to be the first process to fail; return whether that is true, and the exit status of the first."""
        if self._first is None:
            try:
                first = self._store.compare_set(_KEY, "", f"{self.rank} {status}").split()
                self._first = int(first[0]), int(first[1])
            except RuntimeError:  # the process that kept the store is gone
                return False, status
        rank, status = self._first
        return rank == self.rank, status

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _wait(self) -> None:
        while not self._has_failed():
            if self._is_over.wait(_POLL_SECONDS):
                return
        _, status = self.claim(1)
        if not self._is_over.wait(_GRACE_SECONDS):
            _exit_at_once(status)

    def _has_failed(self) -> bool:
        try:
            return self._store.check([_KEY])
        except RuntimeError:
            return True


_watch: _Watch | None = None


def begin_watch(store: torch.distributed.Store, rank: int) -> None:
    """Watch for failures of the other processes of a group, which share a store."""
    global _watch
    _watch = _Watch(store, rank)


def end_watch() -> None:
    """Stop watching; before the processes leave their group."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None


def fail(text: str, status: int, rank: int) -> NoReturn:
    """End this process with an exit status; print the text on stderr if it is the first to fail."""
    is_first, status = _claim_alone(status, rank) if _watch is None else _watch.claim(status)
    _ignore_signals()
    if is_first:
        _record(text)
        print(text, file=sys.stderr, flush=True)
    else:
        time.sleep(_LATER_SECONDS)  # torchrun compares whole seconds to find the first failure
    _end(status, rank)


def stop(text: str, status: int, rank: int) -> NoReturn:
    """End this process, which was asked to stop, possibly because another has failed."""
    _ignore_signals()
    asked = status
    if _watch is not None:
        _, status = _watch.claim(status)
    if rank == 0 and status == asked:
        print(text, file=sys.stderr)
    _end(status, rank)


def _claim_alone(status: int, rank: int) -> tuple[bool, int]:
    """Like `claim`, for processes that do not share a store yet.

    Most likely all fail for the same reason, and rank 0 reports it. The launcher then ends the others.
    """
    try:
        time.sleep(_FIRST_RANK_SECONDS if rank else 0)
    except Interruption:
        return False, status
    return True, status


def _ignore_signals() -> None:
    for number in (signal.SIGINT, *STOP_SIGNALS):  # the launcher ends all processes now
        signal.signal(number, signal.SIG_IGN)


def _record(text: str) -> None:
    """Write the text to the file whose content torchrun prints last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": details}}, file)


def _end(status: int, rank: int) -> NoReturn:
    atexit.register(_exit_at_once, status)
    if _watch is not None and rank == 0:
        time.sleep(_LINGER_SECONDS)
    raise SystemExit(status)


def _exit_at_once(status: int) -> NoReturn:
    # A regular exit would wait for the process group, in which the others may be waiting for this process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
