"""Errors a user can mend: one sentence that says what is wrong, where, and what to do."""

import difflib
import errno
import multiprocessing
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

from mambavision.text import escaped

USAGE, BAD_DATA, IO_FAILURE, PREEMPTED = 2, 65, 74, 75  # exit statuses, all but the first as in sysexits.h


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


class Interruption(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM or SIGUSR1, by which Slurm and timeout end programs; `advice` may say how to go on."""

    advice = ""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_status = 128 + number


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def run_cli(main: Callable[[], None]) -> None:
    """Run a program; errors of the user and interruptions end it with a sentence on stderr instead of a traceback.

    Of several processes the one that fails first says why, in the last words of the program: the others, which fail
    because it is gone or because they were all asked for the same, keep silent and take over its exit status.
    """
    from mambavision.output import lasting_output

    _raise_interruptions()
    try:
        with lasting_output():
            _check_backend()
            main()
    except UserError as error:
        _end(f"error: {escaped(_sentence(error))}", error.exit_status)
    except Interruption as interruption:
        _end(f"interrupted{escaped(interruption.advice)}", interruption.exit_status, was_asked=True)
    except Exception as error:
        lack = _lack_behind(error)
        if lack:
            _end_abruptly(f"error: {escaped(lack)}")
        if _rank() is None:
            raise
        _end(traceback.format_exc().rstrip(), 1)


def _end_abruptly(text: str) -> NoReturn:
    """End without cleaning up: half-built loaders would complain, and need files of which there are none left."""
    if _rank() is not None:
        sys.unraisablehook = lambda *_: None
        _end(text, IO_FAILURE)
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
    os._exit(IO_FAILURE)


def _lack_behind(error: BaseException | None) -> str:
    """Return a sentence about what the system lacks: files, shared memory, characters; empty if that is not the reason.

    Nothing is imported or opened here: there may be no file descriptor left.
    """
    while error is not None:
        number, text = getattr(error, "errno", None), str(error)
        if number in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in text:
            return (
                "too many open files for this process; raise their limit (see ulimit -n), or lower the number of data "
                "loader workers (--workers, in configs num_workers)."
            )
        if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
            return (
                f"{error.object!a}: names of files have no such characters in this locale ({error.encoding}); set "
                "PYTHONUTF8=1 or LC_ALL=C.UTF-8."
            )
        # The semaphores of multiprocessing are files there, too.
        is_semaphore = isinstance(error, OSError) and _raised_in(error, "synchronize.py")
        if is_semaphore or "shared memory" in text:
            reason = re.split(r"\n|\. ", text.strip())[0].rstrip(".")
            return (
                f"/dev/shm: the workers of data loaders cannot use it ({reason}); make it writable and larger (docker "
                "run --shm-size=8g or --ipc=host), or load the data without workers (--workers 0, in configs "
                "num_workers=0)."
            )
        error = error.__cause__ or error.__context__
    return ""


def _raised_in(error: BaseException, file: str) -> bool:
    last = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    return any(os.path.basename(name) == file for name in last)


def _end(text: str, status: int, was_asked: bool = False) -> NoReturn:
    rank = _rank()
    if rank is not None:
        from mambavision import failure

        end = failure.stop if was_asked else failure.fail
        end(text, status, rank)
    print(text, file=sys.stderr)
    raise SystemExit(status) from None


def _rank() -> int | None:
    """Return the number of this process among several, or None if it is alone."""
    from mambavision.launch import this_process

    try:
        process = this_process()
    except UserError:  # it does not know
        return None
    return process.rank if process.is_distributed else None


def _raise_interruptions() -> None:
    program = os.getpid()

    def interrupt(number, frame):
        if os.getpid() == program:
            # To torch, workers that end by the same signal would be an error.
            signal.signal(signal.SIGCHLD, lambda *_: None)
            raise Interruption(number)
        if number == signal.SIGTERM:  # a worker process: it leaves the talking to the program
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and background jobs of scripts have it
            signal.signal(number, interrupt)


def _check_backend() -> None:
    from vision_kernels.backends import check_forced_backend

    try:
        check_forced_backend()
    except ValueError as error:
        raise UserError(str(error)) from None


def _sentence(error: UserError) -> str:
    # An error that crossed a data loader's process boundary carries the worker's traceback before the message.
    return re.split(rf"\n\S*{type(error).__name__}: ", str(error))[-1].strip()
