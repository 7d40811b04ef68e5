"""Random number generators: saving and restoring their state, and seeding them from given numbers."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info


def random_state() -> dict[str, Any]:
    """Return the state of all random number generators of this process, in types that load safely."""
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state()  # a tuple for the default generator
    name, keys, position, has_gauss, cached = legacy
    return {
        "python": (version, list(internal), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the state that `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_from(*entropy: int) -> int:
    """Return a 32-bit seed derived from non-negative numbers."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch (CPU) within a context.

    Their previous state is restored afterwards, except in data loader workers, which draw nothing else.

    Args:
        *entropy: Non-negative numbers, such as seed, epoch, process and sample.
    """
    with contextlib.nullcontext() if get_worker_info() else _preserved():
        seed = seed_from(*entropy)
        random.seed(seed)
        np.random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _preserved() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
