"""Atomic writing: a path always holds a complete file, the previous one or the new one."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

from mambavision.errors import OutputError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # see `replacing`


def check_writable(path: str | os.PathLike) -> None:
    """Raise an OutputError if `replacing` could not write `path`: before long work instead of after it.

    Tries it, as permissions do not tell everything, in the nearest folder that exists. Nothing is left behind.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path}: cannot be written (it is a folder); give the path of a file.")
    try:
        with tempfile.TemporaryFile(dir=_existing_parent(path)):
            pass
    except OSError as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike):
    """Open a temporary binary file that takes the place of `path` only once it is complete and on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:
        failure = _os_error_behind(error)
        if failure is None:
            raise
        raise unwritable(path, failure) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def remove_temporaries(folder: Path) -> None:
    """Remove the unfinished files that `replacing` left in a folder when its process was killed."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """torch.save raises a RuntimeError of its own while it handles that of a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def sync_directory(directory: Path) -> None:
    """Let what was renamed in a folder outlast a loss of power."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def unwritable(path: Path, error: OSError) -> OutputError:
    """Return the error that explains why a file cannot be written."""
    remedy = "choose another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(_existing_parent(path)).free
        lack = (
            f"only {free:,} bytes are free there; free more"
            if error.errno != errno.EFBIG
            else (f"files may not grow that large, though {free:,} bytes are free there; raise the limit (ulimit -f)")
        )
        remedy = f"{lack}, or {remedy}"
    return OutputError(f"{path}: cannot be written ({error.strerror or error}); {remedy}.")
