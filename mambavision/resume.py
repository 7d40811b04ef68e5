"""Continuing an interrupted run: random states, and finding the newest checkpoint that is whole."""

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambavision.checkpoint import read_checkpoint, read_outline
from mambavision.errors import CheckpointError

_logger = logging.getLogger(__name__)


def random_state() -> dict[str, Any]:
    """Return the state of all random number generators of this process, in types that load safely."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, list(internal), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


STARTED = "started"  # in checkpoints: the number of the start that wrote it, see `number_of_start`

Position = tuple[float, ...]  # of a checkpoint; greater for newer ones


def position(checkpoint: Mapping[str, Any]) -> Position:
    """Return what is greater for newer checkpoints of a run: the start that wrote it, epoch, and batch in the epoch."""
    next_batch = checkpoint.get("next_batch")
    batch = math.inf if next_batch is None else number(next_batch)  # None: the epoch is finished
    return number(checkpoint.get(STARTED)), number(checkpoint.get("epoch")), batch


def number_of_start(positions: Iterable[Position]) -> float:
    """Return a number for a start of a program that is greater than those of all earlier ones of its run.

    It is the time, unless clocks are wrong. So files of this start are newer than all that were there before, even if
    it goes back to an earlier epoch.

    Args:
        positions: Of the checkpoints that are there, each with the number of its start first.
    """
    return max([time.time(), *(position[0] + 1 for position in positions)])


def newest_valid(
    paths: Iterable[Path],
    position: Callable[[Mapping[str, Any]], Position] = position,
    first_start: float = -math.inf,
) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest of some checkpoint files that can be read, with its content, or None.

    Files that cannot be read are named in the log, unless they are older. Of several that are equally new, the first is
    taken.

    Args:
        paths: The files.
        position: Returns from the content of a file what is greater for newer files. Times of files do not matter:
            they change when files are copied.
        first_start: Leave out what starts with smaller numbers wrote.
    """
    positions = {}
    for path in paths:
        outline = read_outline(path) or _read(path)  # without an outline, it is damaged or of an old format
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
        _logger.warning("passed over %s", error)
        return None


def number(value: Any) -> float:
    """Return a number from a checkpoint, or -1 for anything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) else -1
