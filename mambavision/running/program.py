"""Entry point wrapper: reports user errors and interruptions in one sentence instead of a traceback."""

import errno
import multiprocessing
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mambavision.errors import IO_FAILURE, Interruption, UserError
from mambavision.running import failure
from mambavision.running.output import lasting_output
from mambavision.running.process import STOP_SIGNALS, this_process
from mambavision.running.ranges import check_ranges
from mambavision.text import escaped
from vision_kernels.backends import check_forced_backend

_WORKER_SECONDS = 1.0  # to end after SIGTERM


def run_cli(main: Callable[[], None], options: Mapping[str, Any] | None = None) -> None:
    """Run a program; a user error or interruption ends it with a sentence on stderr instead of a traceback.

    With several processes, only the first to fail prints its error, as the last output of the program. The others exit
    silently with the same status.

    Args:
        main: The program.
        options: Options whose ranges are checked first.
    """
    _raise_interruptions()
    try:
        with lasting_output():
            _check_backend()
            check_ranges(options or {})
            main()
    except UserError as error:
        _end(f"error: {escaped(_sentence(error))}", error.exit_status)
    except Interruption as interruption:
        _end(f"interrupted{escaped(interruption.advice)}", interruption.exit_status, was_asked=True)
    except Exception as error:
        lack = _missing_resource(error)
        if lack:
            _end_abruptly(f"error: {escaped(lack)}")
        if _rank() is None:
            raise
        _end(traceback.format_exc().rstrip(), 1)


def _end_abruptly(text: str) -> NoReturn:
    """Exit without cleaning up, for which half-built loaders would need file descriptors: there are none left."""
    if _rank() is not None:
        sys.unraisablehook = lambda *_: None
        _end(text, IO_FAILURE)
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
        worker.join(_WORKER_SECONDS)
    sys.stdout.flush()
    # A worker may have been terminated in the middle of a line.
    print(f"\n{text}" if workers else text, file=sys.stderr, flush=True)
    os._exit(IO_FAILURE)


def _missing_resource(error: BaseException | None) -> str:
    """Return a sentence about a system resource that ran out (files, shared memory, characters); empty if none did.

    Nothing is imported or opened here: there may be no file descriptor left.
    """
    while error is not None:
        number, text = getattr(error, "errno", None), str(error)
        if number in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in text:
            return (
                "too many open files for this process; raise the limit (see ulimit -n), or lower the number of data "
                "loader workers (--workers; num_workers in configs)."
            )
        if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
            return (
                f"{error.object!a}: file names cannot contain such characters in this locale ({error.encoding}); set "
                "PYTHONUTF8=1 or LC_ALL=C.UTF-8."
            )
        # The semaphores of multiprocessing are files in /dev/shm, too.
        is_semaphore = isinstance(error, OSError) and _raised_in(error, "synchronize.py")
        if is_semaphore or "shared memory" in text:
            reason = re.split(r"\n|\. ", text.strip())[0].rstrip(".")
            return (
                f"/dev/shm: data loader workers cannot use it ({reason}); make it writable and larger (docker run "
                "--shm-size=8g or --ipc=host), or load data without workers (--workers 0; num_workers=0 in configs)."
            )
        error = error.__cause__ or error.__context__
    return ""


def _raised_in(error: BaseException, file: str) -> bool:
    last = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    return any(os.path.basename(name) == file for name in last)


def _end(text: str, status: int, was_asked: bool = False) -> NoReturn:
    rank = _rank()
    if rank is not None:
        end = failure.stop if was_asked else failure.fail
        end(text, status, rank)
    print(text, file=sys.stderr)
    raise SystemExit(status) from None


def _rank() -> int | None:
    """Return the rank of this process among several, or None if it is alone."""
    try:
        process = this_process()
    except UserError:  # unknown
        return None
    return process.rank if process.is_distributed else None


def _raise_interruptions() -> None:
    program = os.getpid()

    def interrupt(number, frame):
        if os.getpid() == program:
            if hasattr(signal, "SIGCHLD"):  # torch would report workers that end by the same signal as an error
                signal.signal(signal.SIGCHLD, lambda *_: None)
            raise Interruption(number)
        if number == signal.SIGTERM:  # a worker process, which leaves the message to the program
            os._exit(0)

    for number in (signal.SIGINT, *STOP_SIGNALS):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup and in background jobs of scripts
            signal.signal(number, interrupt)


def _check_backend() -> None:
    try:
        check_forced_backend()
    except ValueError as error:
        raise UserError(str(error)) from None


def _sentence(error: UserError) -> str:
    # An error that crossed the process boundary of a data loader carries the worker's traceback before the message.
    return re.split(rf"\n\S*{type(error).__name__}: ", str(error))[-1].strip()
