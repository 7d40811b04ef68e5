"""The newest valid checkpoint of a run, judged by what the files contain."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mambavision.checkpoint import read_checkpoint, read_outline
from mambavision.errors import CheckpointError

_logger = logging.getLogger(__name__)

STARTED = "started"  # key in checkpoints: the number of the start that wrote it, see `new_start_number`

Position = tuple[float, ...]  # of a checkpoint within its run; greater for newer checkpoints


def position(checkpoint: Mapping[str, Any]) -> Position:
    """Return the start that wrote a checkpoint, its epoch, and its batch within the epoch."""
    next_batch = checkpoint.get("next_batch")
    batch = math.inf if next_batch is None else number(next_batch)  # None: the epoch is complete
    return number(checkpoint.get(STARTED)), number(checkpoint.get("epoch")), batch


def new_start_number(positions: Iterable[Position]) -> float:
    """Return a number for a start of a run that is greater than those of all earlier starts.

    It is the current time, or more if clocks disagree. Files of this start therefore count as newer than all earlier
    ones, even if it returns to an earlier epoch.

    Args:
        positions: Positions of the existing checkpoints, each beginning with the number of its start.
    """
    return max([time.time(), *(position[0] + 1 for position in positions)])


def newest_valid(
    paths: Iterable[Path],
    position: Callable[[Mapping[str, Any]], Position] = position,
    first_start: float = -math.inf,
) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest readable checkpoint file and its content, or None.

    Unreadable files are logged, unless they are older. Among equally new files, the first is returned.

    Args:
        paths: The files.
        position: Maps the content of a file to its position. Modification times do not matter: they change when files
            are copied.
        first_start: Ignore files that were written by starts with smaller numbers.
    """
    positions = {}
    for path in paths:
        outline = read_outline(path) or _read(path)  # no outline: damaged, or in an old format
        if outline is not None:
            positions[path] = position(outline)
    own = [path for path, found in positions.items() if found[0] >= first_start]
    for path in sorted(own, key=positions.__getitem__, reverse=True):
        content = _read(path)
        if content is not None:
            return path, content
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        _logger.warning("skipped %s", error)
        return None


def number(value: Any) -> float:
    """Return a number from a checkpoint, or -1 for anything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) else -1
