"""Exceptions that carry one sentence for the user: what is wrong, where, and what to do."""

USAGE, BAD_DATA, IO_FAILURE, PREEMPTED = 2, 65, 74, 75  # exit statuses; all but the first are from sysexits.h


class UserError(Exception):
    """A request that cannot be fulfilled; the message says what is wrong and how to fix it."""

    exit_status = USAGE


class ArgumentError(UserError, ValueError):
    """An invalid argument of a library function."""


class DataError(UserError):
    """An invalid image, data set or annotation file."""

    exit_status = BAD_DATA


class CheckpointError(UserError):
    """A weight file that cannot be read or does not fit the model."""

    exit_status = BAD_DATA


class UntrustedContentError(CheckpointError):
    """A weight file with objects that are read from trusted files only.

    Attributes:
        found: Qualified name of the first such object.
    """

    def __init__(self, message: str, found: str = "") -> None:
        super().__init__(message)
        self.found = found


class OtherClassesError(CheckpointError):
    """Weights whose classifier has another number of classes than the model's.

    Attributes:
        classes: Number of classes in the file.
    """

    def __init__(self, message: str, classes: int = 0) -> None:
        super().__init__(message)
        self.classes = classes


class DenseModelError(CheckpointError):
    """Weights of a detector or segmentor where a classifier's are needed."""


class NonFiniteError(UserError):
    """A loss, gradient or output that is infinite or NaN."""

    exit_status = BAD_DATA


class OutputError(UserError):
    """A file that cannot be written."""

    exit_status = IO_FAILURE


class Interruption(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGUSR1 (sent by Slurm and `timeout`); `advice` may say how to resume."""

    advice = ""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.exit_status = 128 + signal_number


class Preempted(Interruption):
    """The end of a run that was asked to stop and has saved its state."""

    def __init__(self, advice: str) -> None:
        super().__init__(0)
        self.exit_status = PREEMPTED
        self.advice = advice
