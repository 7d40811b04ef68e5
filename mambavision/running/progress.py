"""Progress: a bar on a terminal, otherwise occasional log lines."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from mambavision.running.logs import console

_BAR_TEXT_EVERY_SECONDS = 0.5
_LINE_EVERY_SECONDS = 10.0

_logger = logging.getLogger(__name__)


class ProgressLine:
    """Progress of one pass over data.

    Args:
        name: Name of the pass.
        total: Number of steps.
        interval: Steps between log lines.
        done: Steps completed earlier.
        log_end: Log the last step as well.
    """

    def __init__(self, name: str, total: int, interval: int, done: int = 0, log_end: bool = True) -> None:
        self.name = name
        self.log_end = log_end
        self.total = total
        self.interval = max(1, interval)
        self.done = self._done_at_start = done
        self._started = self._described = time.monotonic()
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            ]  # fmt: skip
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(name, total=total, completed=done)
            self._bar.start()

    def step(self, describe: Callable[[], str] = str, count: int = 1) -> bool:
        """Count steps; return True if one of them is to be logged. Slow passes also show steps in between.

        Args:
            describe: Returns the text to show. May be costly: it is called only if the text is shown.
            count: Number of steps.
        """
        before, self.done = self.done, self.done + count
        is_end = self.done == self.total and self.log_end
        is_logged = self.done // self.interval > before // self.interval or is_end
        patience = _LINE_EVERY_SECONDS if self._bar is None else _BAR_TEXT_EVERY_SECONDS
        if is_logged or time.monotonic() - self._described > patience:
            self._show(describe())
            self._described = time.monotonic()
        if self._bar is not None:
            self._bar.advance(self._task, count)
        return is_logged

    def _show(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self.name}  {text}")
        else:
            remaining = f"  ETA {duration(self._remaining())}" if self.done < self.total else ""
            _logger.info("%s [%d/%d] %s%s", self.name, self.done, self.total, text, remaining)

    def _remaining(self) -> float:
        elapsed = time.monotonic() - self._started
        return elapsed / max(1, self.done - self._done_at_start) * (self.total - self.done)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


class _SilentLine(ProgressLine):
    """Progress that is not shown."""

    def __init__(self) -> None:
        pass

    def step(self, describe: Callable[[], str] = str, count: int = 1) -> bool:
        return False

    def close(self) -> None:
        pass


@contextmanager
def progress(
    name: str, total: int, interval: int | None = None, is_first: bool = True, done: int = 0, log_end: bool = True
) -> Iterator[ProgressLine]:
    """Yield a `ProgressLine`, which shows nothing unless `is_first`; without `interval`, only slow passes log."""
    if interval is None:
        interval, log_end = total + 1, False
    line = ProgressLine(name, total, interval, done, log_end) if is_first else _SilentLine()
    try:
        yield line
    finally:
        line.close()


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds as text."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
