"""Deterministic sampling: random numbers of a sample that depend on seed, process, epoch and sample alone.

Neither the number of data loader workers nor an interruption changes what a run sees.
"""

import mmap
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from mambavision.running.random_state import seeded


class SampleView(NamedTuple):
    """One view of a sample: the index that samplers yield, made distinct by epoch and repetition."""

    epoch: int
    times: int  # earlier views of the sample within the epoch
    index: Any  # as samplers yield it: one number, or several


class ViewCounter:
    """Turns the indices of an epoch into `SampleView`s, counting how often each has come before."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._seen: Counter[Hashable] = Counter()

    def view(self, index: Hashable) -> SampleView:
        """Return the next view of a sample."""
        times = self._seen[index]
        self._seen[index] += 1
        return SampleView(self._epoch, times, index)

    @property
    def is_empty(self) -> bool:
        """True before the first view."""
        return not self._seen


def entropy_of(view: SampleView, seed: int, rank: int, size: int) -> tuple[int, ...]:
    """Return the numbers that the random numbers of a view are derived from."""
    return seed, rank, view.epoch, view.times, *np.ravel(view.index).tolist()


class SeededDataset(Dataset):
    """A data set indexed by `SampleView`, each of which has its own random numbers.

    All other attributes are read from and written to the wrapped data set.

    Args:
        dataset: Data set that draws random numbers, usually for augmentation.
        seed: Seed of the run.
        rank: Rank of this process.
        entropy: Derives the seed of a view from the view, `seed`, `rank` and the length of the data set.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        rank: int,
        entropy: Callable[[SampleView, int, int, int], tuple[int, ...]] = entropy_of,
    ) -> None:
        vars(self).update(_dataset=dataset, _seed=seed, _rank=rank, _entropy=entropy)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, view: SampleView) -> Any:
        with seeded(*self._entropy(view, self._seed, self._rank, len(self._dataset))):
            return self._dataset[view.index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_dataset", "_seed", "_rank", "_entropy"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the wrapped data set, because hooks replace its pipeline."""
        setattr(self._dataset, name, value)


def shared_zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros in memory that this process shares with its data loader workers."""
    zeros = torch.zeros(count, dtype=dtype)
    try:
        return zeros.share_memory_()
    except (RuntimeError, OSError):  # /dev/shm is full or read-only: forked workers at least share this
        return torch.frombuffer(mmap.mmap(-1, max(1, zeros.nbytes)), dtype=dtype, count=count) if count else zeros
