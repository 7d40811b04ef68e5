"""Continuing an interrupted run: random states, and finding the newest checkpoint that is whole."""

import logging
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambavision.checkpoint import read_checkpoint
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


def time_written(path: Path) -> int:
    return path.stat().st_mtime_ns


def newest_valid(
    paths: Iterable[Path], key: Callable[[Path], int] = time_written
) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest of some checkpoint files that can be read, with its content, or None.

    Newer files that cannot be read are named in the log. `key` is what is greater for newer files.
    """
    for path in sorted(paths, key=key, reverse=True):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            _logger.warning("passed over %s", error)
    return None
