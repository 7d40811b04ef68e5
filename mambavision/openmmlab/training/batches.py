"""Training data of mmengine whose order and augmentation depend on seed, epoch and process alone.

So neither the number of workers nor an interruption changes what a run sees, and a run can start at any batch.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from mambavision.errors import UserError
from mambavision.running.random_state import seeded
from mambavision.running.signals import shield_worker


class Showing(NamedTuple):
    """A sample, and how often it was shown before."""

    epoch: int  # or pass over the data
    times: int  # within the epoch
    index: Hashable  # as samplers yield it: a number, or several


class SeededDataset(Dataset):
    """Gives every `Showing` of a sample its own random numbers; in all else the data set it wraps."""

    def __init__(self, dataset: Dataset, seed: int, rank: int) -> None:
        vars(self).update(_dataset=dataset, _entropy=(seed, rank))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, showing: Showing) -> Any:
        with seeded(*self._entropy, showing.epoch, showing.times, *np.ravel(showing.index).tolist()):
            return self._dataset[showing.index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Reach the data set: hooks replace its pipeline."""
        setattr(self._dataset, name, value)


class Showings(Sampler):
    """Batches of another batch sampler as `Showing` of samples, from any batch on; none before `start`.

    Args:
        batch_sampler: Yields batches of indices.
        endless: Epoch after epoch, instead of one.
    """

    def __init__(self, batch_sampler: BatchSampler, endless: bool) -> None:
        self.batch_sampler, self.endless = batch_sampler, endless
        self.sampler, self.batch_size = batch_sampler.sampler, batch_sampler.batch_size  # mmengine looks for them
        self._epoch, self._first = 0, None

    def start(self, epoch: int, first: int) -> None:
        """Let the next iteration begin at a batch of an epoch, both counted from 0."""
        self._epoch, self._first = epoch, first

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[Showing]]:
        if self._first is None:
            return iter(())
        return itertools.islice(self._batches(), self._first, None)

    def _batches(self) -> Iterator[list[Showing]]:
        if isinstance(self.sampler, InfiniteSampler):  # goes on where it was left, otherwise
            self.sampler.indices = self.sampler._indices_of_rank()
        for epoch in itertools.count(self._epoch) if self.endless else [self._epoch]:
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            shown: Counter[Hashable] = Counter()
            for batch in self.batch_sampler:
                showings = []
                for index in batch:
                    showings.append(Showing(epoch, shown[index], index))
                    shown[index] += 1
                yield showings
            if not shown:
                raise UserError(
                    f"train_dataloader: there are fewer images than one batch of {self.batch_size} on each process; "
                    "lower batch_size, or set drop_last=False."
                )


def _start_worker(program: int, start: Callable[[int], None] | None, worker: int) -> None:
    shield_worker(program, worker)
    if start is not None:
        start(worker)


def exact_loader(loader: DataLoader, seed: int, rank: int, endless: bool) -> DataLoader:
    """Return a data loader with the data and settings of another, whose batch sampler is a `Showings`."""
    return DataLoader(
        SeededDataset(loader.dataset, seed, rank),
        batch_sampler=Showings(loader.batch_sampler, endless),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=partial(_start_worker, os.getpid(), loader.worker_init_fn),
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),  # of its own, to keep its hands off the global random state
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
