"""Errors a user can mend: one sentence that says what is wrong, where, and what to do."""

import difflib
import re
import sys
from collections.abc import Callable, Iterable

USAGE, BAD_DATA, IO_FAILURE = 2, 65, 74  # exit statuses; the last two as in sysexits.h


class UserError(Exception):
    """Something in the request cannot be done; the message names it and the remedy."""

    exit_status = USAGE


class DataError(UserError):
    """An image, a data set or an annotation file is not what it should be."""

    exit_status = BAD_DATA


class CheckpointError(UserError):
    """A weight file cannot be read or does not belong to the model."""

    exit_status = BAD_DATA


class OutputError(UserError):
    """A file cannot be written."""

    exit_status = IO_FAILURE


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def run_cli(main: Callable[[], None]) -> None:
    """Run a program; a UserError ends it with one sentence on stderr and its exit status instead of a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _sentence(error: UserError) -> str:
    # An error that crossed a data loader's process boundary carries the worker's traceback before the message.
    return re.split(rf"\n\S*{type(error).__name__}: ", str(error))[-1].strip()
