"""Work that is killed at a chosen moment, for tests of what it leaves behind.

The work runs in a forked process whose file operations are counted: opening, writing, fsync, renaming, linking,
removing. Before and after each of them, and in the middle of every write, is a point at which SIGKILL can come.
"""

import builtins
import io
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

_OPERATIONS = ("open", "fsync", "replace", "rename", "link", "symlink", "unlink", "remove", "rmdir", "mkdir")


class _Points:
    """Counts the points of this process, and ends it at one of them."""

    def __init__(self, last: int | None) -> None:
        self.passed = 0
        self._last = last

    def next(self) -> None:
        if self.passed == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1

    def around(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.next()
            result = operation(*args, **kwargs)
            self.next()
            return result

        return counted

    def opened(self, file: str | int, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return _open(file, mode, *args, **kwargs)
        return _CountedFile(self.around(_open)(file, mode, *args, **kwargs), self)


class _CountedFile:
    """A file whose writing can be cut short."""

    def __init__(self, file: Any, points: _Points) -> None:
        self._file, self._points = file, points

    def write(self, data: Any) -> int:
        self._points.next()
        middle = len(data) // 2
        written = self._file.write(data[:middle])
        self._file.flush()
        self._points.next()
        return written + self._file.write(data[middle:])

    def __enter__(self) -> "_CountedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._points.next()
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


_open = open


@contextmanager
def _counted(points: _Points) -> Iterator[None]:
    patches = [mock.patch.object(os, name, points.around(getattr(os, name))) for name in _OPERATIONS]
    patches += [mock.patch.object(module, "open", points.opened) for module in (builtins, io)]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


Report = Callable[[int], None]  # tells the parent a number below 256


def _in_child(work: Callable[[Report], None], delay: float | None, last: int | None) -> tuple[bool, list[int]]:
    """Fork; return whether the child was killed, and the numbers that it has reported."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            points = _Points(last)
            with _counted(points):
                work(lambda number: os.write(write, bytes([number])))
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    with _open(read, "rb") as pipe:
        reported = list(pipe.read())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise AssertionError(f"the work failed by itself with status {status}")
    return status != 0, reported


def killed_at(point: int, work: Callable[[Report], None]) -> tuple[bool, list[int]]:
    """Do `work` in a process that is killed at a point (from 0) of its file operations.

    Returns:
        Whether it got that far, and the numbers that the work has reported until then.
    """
    return _in_child(work, None, point)


def killed_after(seconds: float, work: Callable[[Report], None]) -> tuple[bool, list[int]]:
    """Do the same with a process that is killed after some time."""
    return _in_child(work, seconds, None)


def count_points(work: Callable[[Report], None]) -> int:
    """Return how many points some work has: it is done, in this process."""
    points = _Points(None)
    with _counted(points):
        work(lambda number: None)
    return points.passed


def point_of(seed: int, rounds: int, points: int) -> int:
    """Return a random one of some points; equal parts of them belong to the seeds of all rounds."""
    return seed * points // rounds + random.Random(seed).randrange(points // rounds)
