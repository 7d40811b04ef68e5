"""How a program of several processes fails: all of them end, and what the first to fail has to say comes last.

The processes share a store, in which the first to fail leaves its number and exit status. The others fail a moment
later, because the connection to it is lost, or wait in a collective that never ends: they keep silent and end too.
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

_KEY = "first failure"
_FIRST_SPEAKS_SECONDS = 10.0
_POLL_SECONDS = 1.0
_LINGER_SECONDS = 2.5  # of the process that keeps the store: the others poll meanwhile
_LATER_SECONDS = 1.0
_GRACE_SECONDS = 20.0  # in which a process may end by itself, once another has failed


class _Watch:
    """The store of a group of processes, and a thread that ends this one some time after another has failed."""

    def __init__(self, store: torch.distributed.Store, rank: int) -> None:
        self.rank = rank
        self._store = store
        self._first: tuple[int, int] | None = None  # to fail, and its exit status, as soon as it is known
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._wait, name="failures of other processes", daemon=True)
        self._thread.start()

    def claim(self, status: int) -> tuple[bool, int]:
        """Return whether this process is the first to fail, and the exit status of the one that is."""
        if self._first is None:
            try:
                rank, first_status = self._store.compare_set(_KEY, "", f"{self.rank} {status}").split()
                self._first = int(rank), int(first_status)
            except RuntimeError:  # the process that kept the store is gone, without a word
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
            _leave_at_once(status)

    def _has_failed(self) -> bool:
        try:
            return self._store.check([_KEY])
        except RuntimeError:
            return True


_watch: _Watch | None = None


def begin_watch(store: torch.distributed.Store, rank: int) -> None:
    """Let the processes of a group, which share a store, know of each other's failures."""
    global _watch
    _watch = _Watch(store, rank)


def end_watch() -> None:
    """Before the processes leave their group."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None


def fail(text: str, status: int, rank: int) -> NoReturn:
    """End this process of several with an exit status, and with some text on stderr if it is the first to fail."""
    speaks, status = _claim_alone(status, rank) if _watch is None else _watch.claim(status)
    _ignore_signals()
    if speaks:
        _record(text)
        print(text, file=sys.stderr, flush=True)
    else:
        time.sleep(_LATER_SECONDS)  # torchrun goes by whole seconds to find out who was first
    _end(status, rank)


def stop(text: str, status: int, rank: int) -> NoReturn:
    """End this process of several, which was asked to leave, possibly because another has failed."""
    _ignore_signals()
    asked = status
    if _watch is not None:
        _, status = _watch.claim(status)
    if rank == 0 and status == asked:
        print(text, file=sys.stderr)
    _end(status, rank)


def _claim_alone(status: int, rank: int) -> tuple[bool, int]:
    """Like `claim`, of processes that do not share a store yet.

    Most likely all fail for the same reason, and the first process says it. What started them ends the others then.
    """
    try:
        time.sleep(_FIRST_SPEAKS_SECONDS if rank else 0)
    except Interruption:
        return False, status
    return True, status


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # what started the processes ends all of them now
        signal.signal(number, signal.SIG_IGN)


def _record(text: str) -> None:
    """Leave the text where torchrun looks for what it shows last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": details}}, file)


def _end(status: int, rank: int) -> NoReturn:
    atexit.register(_leave_at_once, status)
    if _watch is not None and rank == 0:
        time.sleep(_LINGER_SECONDS)
    raise SystemExit(status)


def _leave_at_once(status: int) -> NoReturn:
    # The interpreter's own end would wait for the group of processes, in which the others may wait for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
