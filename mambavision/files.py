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
_UNLOCKED_TEMPORARY = re.compile(r"\..+\.\d+(-[0-9a-f]{8}\.link)?\.tmp")  # see `link`; also of earlier versions
_MAX_NAME_BYTES = 100  # of the target, in the name of a temporary file

_open: set[str] = set()  # names of the temporary files that this process is writing
_swept: set[Path] = set()  # folders in which this process has removed abandoned files


def check_writable(path: str | os.PathLike) -> None:
    """Raise an OutputError if `replacing` could not write `path`; to be called before long work.

    Permissions are not sufficient to decide this, so a temporary file is created in the nearest existing folder.
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
    """Open a temporary binary file that replaces `path` once it is complete and on disk.

    Several processes and threads may write the same path: the last one to finish wins. The first write to a folder
    removes the temporary files of killed processes. Symbolic links are kept, and devices and pipes, such as
    ``/dev/stdout``, are written directly.

    Raises:
        OutputError: The file cannot be written; no partial file remains.
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
            if fcntl is None:  # Windows cannot rename open files
                file.close()
            os.replace(temporary, path)  # while it is locked, so that no other process removes it as abandoned
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
    """Return True for devices, pipes and the like."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def link(source: Path, target: Path) -> None:
    """Atomically make `target` a hard link to `source`, or a copy where links are not supported."""
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
    """Remove the temporary files that killed processes have left in a folder.

    Files that a running process writes, on this or another machine, are locked (see `try_lock`) and kept. Where there
    are no locks, all are kept.

    Args:
        folder: The folder.
        own: No other process uses the folder, so that the links of `link`, which have no lock, are removed too.
    """
    for path in folder.glob(".*.tmp"):
        is_abandoned = own and _UNLOCKED_TEMPORARY.fullmatch(path.name)
        if is_abandoned or (_TEMPORARY.fullmatch(path.name) and path.name not in _open and _is_unlocked(path)):
            with contextlib.suppress(OSError):  # of another user, in a shared folder
                path.unlink()


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for this process until it closes the file or ends. Forked processes do not inherit the lock.

    Returns:
        True if the lock was acquired, False if another process holds it, None if the file system has no locks.
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
    """Open a new file beside `path`, which is locked while it is open; return its path and the file."""
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
        file.close()  # another process removed it before it was locked
        _open.discard(temporary.name)
        temporary.unlink(missing_ok=True)


def _beside(path: Path, kind: str = "") -> Path:
    """Return a path for a temporary file, unique among processes and threads."""
    name = os.fsencode(path.name)[:_MAX_NAME_BYTES].decode(errors="ignore")
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
    """Return the OSError that led to an error: torch.save raises a RuntimeError for a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def sync_directory(directory: Path) -> None:
    """Flush a folder to disk, so that renamed files survive a power failure."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if os.path.exists(parent))


def _check_lengths(path: Path) -> None:
    """Raise the OSError for names that are too long, which the system checks in existing folders only."""
    if hasattr(os, "pathconf"):
        limit = os.pathconf(_existing_parent(path), "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > limit for part in path.parts):
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
