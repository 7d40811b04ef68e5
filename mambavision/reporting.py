"""Log lines of the programs of all tasks, in harmony with progress bars on a terminal."""

import logging
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
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, handlers=[handler], force=True)
    for noisy in ("httpx", "matplotlib", "PIL", "timm"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # has a handler of its own: its lines would show twice


def line_format() -> logging.Formatter:
    """Return how a log line looks in a file."""
    return logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
