"""What the programs on top of OpenMMLab tell while they work: log lines, and a progress bar on a terminal."""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mambavision import reporting

_LINE_EVERY_SECONDS = 10.0

_logger = logging.getLogger(__name__)


def start_logging() -> None:
    """Show log lines, above the progress bar on a terminal, plain otherwise; no warnings for developers."""
    if not sys.warnoptions:  # as set by python -W
        warnings.simplefilter("ignore")
    reporting.start_logging()


@contextlib.contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts what is done: a bar on a terminal, a line now and then in a log."""
    if sys.stdout.isatty():
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=reporting.console, transient=True) as bar:
            task = bar.add_task(name, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, shown = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        if time.monotonic() - shown > _LINE_EVERY_SECONDS:
            _logger.info("%s [%d/%d]", name, done, total)
            shown = time.monotonic()

    yield advance
