"""Log lines of the programs of all tasks, compatible with progress bars on a terminal."""

import contextlib
import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

from mambavision.text import escaped

console = Console()


def start_logging(is_first: bool = True) -> None:
    """Show log lines: coloured and above the progress bar on a terminal, plain otherwise; other ranks warn only."""
    if sys.stdout.isatty():
        handler: logging.Handler = RichHandler(console=console, show_path=False, show_level=False)
        handler.setFormatter(_OneLine("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(line_format())
    tolerate_write_errors(handler)
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, handlers=[handler], force=True)
    for noisy in ("httpx", "matplotlib", "PIL", "timm"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has its own handler; lines would appear twice


def line_format() -> logging.Formatter:
    """Return the format of log lines in files."""
    return _OneLine("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


class _OneLine(logging.Formatter):
    """Escapes control characters in messages, which may contain names of files and classes."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        record.message = escaped(record.message)
        return super().formatMessage(record)


class EscapeOwnMessages(logging.Filter):
    """Escapes this package's messages in the handler of another package, whose own messages may span lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("mambavision"):
            record.msg, record.args = escaped(record.getMessage()), None
        return True


def tolerate_write_errors(handler: logging.Handler) -> None:
    """Continue without log lines if they cannot be written, for example on a full disk; warn once."""
    original = handler.handleError

    def give_up(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            original(record)
            return
        handler.handle = lambda record: False  # type: ignore[method-assign]  # any handler, also of other packages
        with contextlib.suppress(OSError):
            print(f"warning: log lines cannot be written ({error}); continuing without them", file=sys.stderr)

    handler.handleError = give_up  # type: ignore[method-assign]
