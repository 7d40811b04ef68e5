"""Folders that belong to one run at a time."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from mambavision.errors import OutputError, UserError
from mambavision.files import try_lock, unwritable

_logger = logging.getLogger(__name__)

LOCK = "run.lock"  # in the folder of a run while it is running
_POLL_SECONDS = 0.5

_held: set[str] = set()  # folders locked by this process, to which the system would grant the lock again
_held_guard = threading.Lock()


class FolderLock:
    """Exclusive access of a run to its folder. Released on leaving the context, or when the process ends.

    The lock is a POSIX record lock (`fcntl.lockf`), which the system releases even after SIGKILL, and which forked data
    loader workers do not inherit. On NFS it also excludes runs on other machines: an NFS 4 server releases the locks of
    a dead machine after its lease, usually 90 seconds; an NFS 3 server when that machine is back. Where the file system
    has no locks (Lustre mounted without ``flock``, NFS with ``nolock`` across machines) or the system has no fcntl
    (Windows), a second run is not prevented; this is logged where it can be detected.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if isinstance(error, OSError | RuntimeError | OutputError):
                self.check()
        finally:
            self.release()

    def acquire(self, folder: Path, advice: str, *, new: bool = False, patience: float = 0.0) -> None:
        """Lock a folder for this run; its content is not changed before.

        Args:
            folder: Created if it is missing, and removed on release if it is still empty.
            advice: Alternative to waiting for the run that holds the folder, for the error message: "or ...".
            new: The folder must not exist.
            patience: Seconds to wait for a run that holds the folder.

        Raises:
            FileExistsError: The folder exists although `new` is set.
            UserError: Another run holds the folder; the message names its process and machine.
            OutputError: The folder cannot be written.
        """
        missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=not new)
        except FileExistsError:
            if new:
                raise
            raise OutputError(f"{folder}: cannot be written (it is a file); give the path of a folder.") from None
        except OSError as error:
            raise unwritable(folder, error) from error
        self._made = missing
        end = time.monotonic() + patience
        while not self._try(folder):
            if time.monotonic() >= end:
                raise UserError(f"{folder}: {_holder(folder)} is training there; wait for it or end it, {advice}.")
            time.sleep(_POLL_SECONDS)
        self.folder = folder

    def check(self) -> None:
        """Raise an OutputError if the folder was deleted or moved."""
        if self.folder is not None and not (self.folder / LOCK).exists():
            raise OutputError(
                f"{self.folder}: was deleted or moved while this run was writing there ({LOCK} is gone); nothing more "
                "is written; start the run again."
            )

    def release(self) -> None:
        """Release the folder, and remove it if it was created here and is still empty."""
        if self.folder is None:
            return
        folder, self.folder = self.folder, None
        with _held_guard:
            _held.discard(os.path.realpath(folder))
        with contextlib.suppress(FileNotFoundError):  # only by the holder, and before it is unlocked; see `_try`
            if self._descriptor is not None and _is_at(self._descriptor, folder / LOCK):
                (folder / LOCK).unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        for path in self._made:
            try:
                path.rmdir()
            except OSError:  # not empty
                break

    def _try(self, folder: Path) -> bool:
        """Try to acquire the lock; return True if it is held now."""
        key = os.path.realpath(folder)
        with _held_guard:
            if key in _held:  # opening and closing the file again would release the lock
                return False
            _held.add(key)
        try:
            self._descriptor = _locked(folder / LOCK)
        except OSError as error:
            raise unwritable(folder / LOCK, error) from error
        finally:
            if self._descriptor is None:
                with _held_guard:
                    _held.discard(key)
        return self._descriptor is not None


def _locked(path: Path) -> int | None:
    """Lock a lock file; return its descriptor, or None if another process holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            granted = try_lock(descriptor)
            if granted is False:
                os.close(descriptor)
                return None
            if granted is None:
                _logger.warning("%s: no locks on this file system: make sure that no second run uses it", path.parent)
            if _is_at(descriptor, path):  # otherwise its last holder has just removed it
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_this_holder()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _this_holder() -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(folder: Path) -> str:
    if os.path.realpath(folder) in _held:
        return "another run of this process"
    try:
        record = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return f"process {int(record['process'])} on {record['host']!s:.253} (since {record['since']!s:.19})"
    except (OSError, ValueError, LookupError, TypeError):  # the file is being written
        return "another process"
