"""Atomic writing: a path always holds a complete file, the previous one or the new one."""

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mambavision.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # the usual form for a module that may be missing

_TEMPORARY = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.tmp")  # see `_open_temporary`
_ONLY_OF_RUNS = re.compile(r"\..+\.\d+(-[0-9a-f]{8}\.link)?\.tmp")  # see `link`; without it, of earlier versions
_MOST_BYTES_OF_NAME = 100  # in the name of a temporary file, so that it is never too long

_open: set[str] = set()  # names of the temporary files that this process is writing
_swept: set[Path] = set()  # folders where this process has removed what killed ones left


def check_writable(path: str | os.PathLike) -> None:
    """Raise an OutputError if `replacing` could not write `path`: before long work instead of after it.

    Tries it, as permissions do not tell everything, in the nearest folder that exists. Nothing is left behind.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise OutputError(f"{path}: cannot be written (it is a folder); give the path of a file.")
    try:
        _check_lengths(path)
        if _is_special(path):
            return
        with tempfile.TemporaryFile(dir=_existing_parent(path)):
            pass
    except OSError as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[io.BufferedWriter]:
    """Open a temporary binary file that takes the place of `path` only once it is complete and on disk.

    Processes and threads may write the same path at once: the last to be complete stays. What processes that were
    killed have left in the folder is removed when a process first writes there. A link stays a link, and devices and
    pipes, such as ``/dev/stdout``, are written as they are: nothing may take their place.
    """
    path = Path(path)
    temporary = None
    try:
        if _is_special(path):
            with path.open("wb") as file:
                yield file
            return
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        temporary, file = _open_temporary(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no open file
                file.close()
            os.replace(temporary, path)  # still locked: no other process takes it for abandoned
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:
        failure = _os_error_behind(error)
        if failure is None:
            raise
        raise unwritable(path, failure) from error
    finally:
        if temporary is not None:
            _open.discard(temporary.name)
            temporary.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether it is a device, a pipe or the like."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` (a copy where links are impossible), in one step."""
    temporary = _beside(target, ".link")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            with replacing(target) as copy, source.open("rb") as file:
                shutil.copyfileobj(file, copy)
            return
        os.replace(temporary, target)
        sync_directory(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, own: bool = True) -> None:
    """Remove the unfinished files that `replacing` left in a folder when its process was killed.

    Files that a living process writes stay, on whatever machine it is: they are locked (see `try_lock`). Without locks,
    nobody can tell, and they stay too.

    Args:
        own: The folder belongs to this process alone, so that the links of `link` are abandoned as well.
    """
    for path in folder.glob(".*.tmp"):
        is_abandoned = own and _ONLY_OF_RUNS.fullmatch(path.name)
        if is_abandoned or (_TEMPORARY.fullmatch(path.name) and path.name not in _open and _is_unlocked(path)):
            with contextlib.suppress(OSError):  # of somebody else, in a shared folder
                path.unlink()


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for this process until it closes the file or ends; None if there are no locks here.

    Returns:
        Whether no other process holds the lock. Processes that are forked do not inherit it.
    """
    if fcntl is None:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL):
            return None
        raise
    return True


def _open_temporary(path: Path) -> tuple[Path, io.BufferedWriter]:
    """Return a new file beside `path`, and open it; it is locked while it is open."""
    while True:
        temporary = _beside(path)
        _open.add(temporary.name)
        try:
            file = temporary.open("xb")
        except BaseException:
            _open.discard(temporary.name)
            raise
        if try_lock(file.fileno()) is not False and temporary.exists():
            return temporary, file
        file.close()  # another process has removed it before it was locked
        _open.discard(temporary.name)
        temporary.unlink(missing_ok=True)


def _beside(path: Path, kind: str = "") -> Path:
    """Return a path for a temporary file that is no other's, of any process or thread."""
    name = os.fsencode(path.name)[:_MOST_BYTES_OF_NAME].decode(errors="ignore")
    return path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}{kind}.tmp")


def _sweep_once(folder: Path) -> None:
    if folder.absolute() not in _swept:
        _swept.add(folder.absolute())
        remove_temporaries(folder, own=False)


def _is_unlocked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        return try_lock(descriptor) is True
    finally:
        os.close(descriptor)


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
    return next(parent for parent in path.absolute().parents if os.path.exists(parent))


def _check_lengths(path: Path) -> None:
    """Raise the OSError for names that are too long; the system itself stops at the first folder that is missing."""
    if hasattr(os, "pathconf"):
        most = os.pathconf(_existing_parent(path), "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > most for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


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
    if error.errno == errno.ENAMETOOLONG:
        remedy = "choose a shorter one"
    return OutputError(f"{path}: cannot be written ({error.strerror or error}); {remedy}.")
