"""Training data of mmengine whose order and augmentation depend on seed, epoch and process only.

A run can start at any batch; see `mambavision.running.sampling`.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from torch.utils.data import DataLoader, Sampler

from mambavision.errors import UserError
from mambavision.running.sampling import SampleView, SeededDataset, ViewCounter
from mambavision.running.signals import shield_worker


class ViewBatches(Sampler):
    """Batches of a batch sampler as `SampleView`s, from any batch on; empty before `start`.

    Args:
        batch_sampler: A BatchSampler of torch or OpenMMLab.
        endless: Epoch after epoch, instead of one.
    """

    def __init__(self, batch_sampler: Any, endless: bool) -> None:
        self.batch_sampler, self.endless = batch_sampler, endless
        self.sampler, self.batch_size = batch_sampler.sampler, batch_sampler.batch_size  # mmengine reads them
        self._epoch = 0
        self._first: int | None = None

    def start(self, epoch: int, first: int) -> None:
        """Start the next iteration at a batch of an epoch, both counted from 0."""
        self._epoch, self._first = epoch, first

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[SampleView]]:
        if self._first is None:
            return iter(())
        return itertools.islice(self._batches(), self._first, None)

    def _batches(self) -> Iterator[list[SampleView]]:
        if isinstance(self.sampler, InfiniteSampler):  # would continue where it was left otherwise
            self.sampler.indices = self.sampler._indices_of_rank()
        for epoch in itertools.count(self._epoch) if self.endless else [self._epoch]:
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            counter = ViewCounter(epoch)
            for batch in self.batch_sampler:
                yield [counter.view(index) for index in batch]
            if counter.is_empty:
                raise UserError(
                    f"train_dataloader: there are fewer images than one batch of {self.batch_size} on each process; "
                    "lower batch_size, or set drop_last=False."
                )


def _start_worker(program: int, start: Callable[[int], None] | None, worker: int) -> None:
    shield_worker(program, worker)
    if start is not None:
        start(worker)


def exact_loader(loader: DataLoader, seed: int, rank: int, endless: bool) -> DataLoader:
    """Return a data loader with the data and settings of another, whose batches are `ViewBatches`."""
    return DataLoader(
        SeededDataset(loader.dataset, seed, rank),
        batch_sampler=ViewBatches(loader.batch_sampler, endless),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=partial(_start_worker, os.getpid(), loader.worker_init_fn),
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),  # its own, so that the global random state is not touched
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
