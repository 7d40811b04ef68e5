"""Log lines of the programs of all tasks, in harmony with progress bars on a terminal."""

import contextlib
import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

from mambavision.text import escaped

console = Console()


def start_logging(is_first: bool = True) -> None:
    """Show log lines: coloured above the progress bar on a terminal, plain otherwise; only warnings of other ranks."""
    if sys.stdout.isatty():
        handler: logging.Handler = RichHandler(console=console, show_path=False, show_level=False)
        handler.setFormatter(_OneLine("%(message)s"))
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
    return _OneLine("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


class _OneLine(logging.Formatter):
    """Shows names of files and classes in a message as they are, whatever characters are in them."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        record.message = escaped(record.message)
        return super().formatMessage(record)


class EscapeOwnMessages(logging.Filter):
    """The same for a handler of another package, whose own messages may have several lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("mambavision"):
            record.msg, record.args = escaped(record.getMessage()), None
        return True


def forgive(handler: logging.Handler) -> None:
    """Let the work go on when log lines cannot be written, such as to a full disk: say so once."""
    original = handler.handleError

    def give_up(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            original(record)
            return
        handler.handle = lambda record: False
        with contextlib.suppress(OSError):
            print(f"warning: log lines cannot be written ({error}); the work goes on without them", file=sys.stderr)

    handler.handleError = give_up
