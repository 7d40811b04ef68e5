"""Log lines of the programs on top of OpenMMLab."""

import logging
import sys
import warnings
from logging.handlers import MemoryHandler

from mambavision.running import logs
from mambavision.running.logs import EscapeOwnMessages, tolerate_write_errors

_ESCAPE = EscapeOwnMessages()


def start_logging() -> None:
    """Show log lines, without warnings for developers."""
    if not sys.warnoptions:  # as set by python -W
        warnings.simplefilter("ignore")
    logs.start_logging()


def collect_log() -> None:
    """Keep this package's messages until `log_to` is called, or until the end of the program."""
    own = logging.getLogger("mambavision")
    shown_at_the_end = logging.StreamHandler()
    shown_at_the_end.addFilter(_ESCAPE)
    own.handlers[:] = [MemoryHandler(1000, flushLevel=logging.CRITICAL + 1, target=shown_at_the_end)]
    own.setLevel(logging.INFO)
    own.propagate = False


def log_to(logger: logging.Logger) -> None:
    """Send this package's messages, including those collected so far, to mmengine's handlers."""
    for handler in logger.handlers:
        tolerate_write_errors(handler)
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            handler.stream.reconfigure(encoding="utf-8")  # mmengine uses the encoding of the locale
    own = logging.getLogger("mambavision")
    collected = [record for handler in own.handlers for record in getattr(handler, "buffer", ())]
    own.handlers[:] = logger.handlers
    for handler in own.handlers:
        handler.addFilter(_ESCAPE)
    for record in collected:
        own.handle(record)
