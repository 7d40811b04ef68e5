"""Log lines of the programs of all tasks, in harmony with progress bars on a terminal."""

import contextlib
import logging
import os
import sys

from rich.console import Console
from rich.logging import RichHandler

console = Console()


def start_logging(is_first: bool = True) -> None:
    """Show log lines: coloured above the progress bar on a terminal, plain otherwise; only warnings of other ranks."""
    if sys.stdout.isatty():
        handler: logging.Handler = RichHandler(console=console, show_path=False, show_level=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(line_format())
    forgive(handler)
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, handlers=[handler], force=True)
    for noisy in ("httpx", "matplotlib", "PIL", "timm"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # has a handler of its own: its lines would show twice


def line_format() -> logging.Formatter:
    """Return how a log line looks in a file."""
    return logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


def forgive(handler: logging.Handler) -> None:
    """Let the work go on when log lines cannot be written, such as to a full disk or a closed pipe: say so once."""
    original = handler.handleError

    def give_up(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            original(record)
            return
        handler.handle = lambda record: False
        if getattr(handler, "stream", None) is sys.stdout or isinstance(handler, RichHandler):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in its buffer would fail at the end again
        with contextlib.suppress(OSError):
            print(f"warning: log lines cannot be written ({error}); the work goes on without them", file=sys.stderr)

    handler.handleError = give_up
