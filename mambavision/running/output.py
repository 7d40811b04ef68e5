"""Standard output whose failure does not end a program: results are in files, and printing them is a courtesy."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from mambavision.errors import OutputError


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let a program finish its work even after writing to standard output has failed.

    After a closed pipe (``| head``), printed text is dropped. Characters that the encoding lacks are escaped.

    Raises:
        OutputError: At the end, if standard output could not be written for another reason, such as a full disk.
    """
    if sys.stdout is None:  # started without one
        yield
        return
    before, sys.stdout = sys.stdout, _LastingStream(sys.stdout)
    if hasattr(before, "reconfigure"):
        before.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
        if sys.stdout.failure is not None:
            reason = sys.stdout.failure.strerror or sys.stdout.failure
            raise OutputError(f"standard output: cannot be written ({reason}); results in files are complete.")
    finally:
        sys.stdout = before


class _LastingStream:
    """A stream that discards everything once writing has failed.

    Attributes:
        failure: The reason; None for a closed pipe.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._stream.flush()

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failure = error
            # What is buffered would fail again, at the latest when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
