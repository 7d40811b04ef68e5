"""Random numbers that depend on stated numbers alone, not on what was drawn before, and numbers for workers."""

import contextlib
import mmap
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import get_worker_info


def seed_of(*entropy: int) -> int:
    """Return a seed of 32 bits that depends on some numbers from 0 on."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Draw from generators of Python, NumPy and PyTorch (of the CPU) that were seeded with some numbers.

    Afterwards the generators go on as before, except in workers of data loaders, which draw nothing else.

    Args:
        *entropy: Numbers from 0 on, such as seed, epoch, process and sample.
    """
    with contextlib.nullcontext() if get_worker_info() else _preserved_random_state():
        seed = seed_of(*entropy)
        random.seed(seed)
        np.random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _preserved_random_state() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def shared_zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros in memory that this process shares with the workers of its data loaders."""
    zeros = torch.zeros(count, dtype=dtype)
    try:
        return zeros.share_memory_()
    except (RuntimeError, OSError):  # /dev/shm is full or read-only: this one is shared by forked workers at least
        return torch.frombuffer(mmap.mmap(-1, max(1, zeros.nbytes)), dtype=dtype, count=count) if count else zeros
