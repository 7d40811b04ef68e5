"""Command-line flags in the errors of the library, which names arguments of functions instead."""

import contextlib
from collections.abc import Iterator

from mambavision.errors import CheckpointError, DenseModelError, OtherClassesError, UntrustedContentError


@contextlib.contextmanager
def naming_flags(training: bool = False) -> Iterator[None]:
    """Add the flags that cure a CheckpointError to its message; a context manager and decorator.

    Args:
        training: The program is train.py, which has more of them.
    """
    try:
        yield
    except CheckpointError as error:
        if flags := _flags(error, training):
            error.args = (f"{str(error).removesuffix('.')} (on the command line: {flags}).",)
        raise


def _flags(error: CheckpointError, training: bool) -> str:
    if isinstance(error, UntrustedContentError):
        is_dense = error.found.startswith("mmengine.")
        return "--trust-checkpoint" + ("; or score it with tools/test.py of its task" if is_dense else "")
    if isinstance(error, OtherClassesError):
        classes = f"--num-classes {error.classes}"
        return f"{classes}, or --skip-head with --initial-checkpoint" if training else classes
    if isinstance(error, DenseModelError):
        return (
            "--loadcheckpoint" if training else "--loadcheckpoint of train.py"
        ) + "; or score it with tools/test.py of its task"
    return ""
