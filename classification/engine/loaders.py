"""Batches of images whose order and augmentation depend on the seed, the epoch and the process only.

Each image is augmented with random numbers of its own, derived from (seed, epoch, process, index, how often the epoch
showed it before), and the order of an epoch from (seed, epoch). So neither the number of workers nor an interruption
changes what a run sees. There are two exceptions: timm's streams have an order of their own, and its prefetcher (on
GPUs, and with --aug-splits) erases parts of images in the main process, a batch ahead.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from timm.data import AugMixDataset, FastCollateMixup, ImageDataset, IterableImageDataset, create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate

from mambavision.errors import UserError
from mambavision.preemption import shield_worker
from mambavision.seeding import seeded, shared_zeros

_DEFAULT_WORKERS = 8


@dataclass(frozen=True)
class Share:
    """The part of the data that this process handles."""

    rank: int = 0
    world_size: int = 1


class SeededDataset(Dataset):
    """Gives every sample its own random numbers; is indexed by what `EpochSampler` yields."""

    def __init__(self, dataset: Dataset, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank
        self.epoch = shared_zeros(1, torch.int64)  # workers outlive epochs

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        with seeded(self.seed, int(self.epoch), self.rank, number):
            return self.dataset[number % len(self.dataset)]


class SeededRepeatSampler(RepeatAugSampler):
    """timm's sampler of repeated images, with an order that depends on a seed too, as torch's samplers' does."""

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed + epoch)


class EpochSampler(Sampler):
    """Repeats a sampler within an epoch, and can start at a later batch of it.

    Yields ``index + size * shown``, where `size` is that of the data set and `shown` how often the epoch had the image
    before, so that the copies of an image can be told apart.
    """

    def __init__(self, sampler: DistributedSampler | SeededRepeatSampler, repeats: int, batch_size: int) -> None:
        self.sampler = sampler
        self.repeats = max(1, repeats)
        self.batch_size = batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[int]:
        return islice(self._whole_epoch(), self.first_batch * self.batch_size, None)

    def _whole_epoch(self) -> Iterator[int]:
        size = len(self.sampler.dataset)
        shown = [0] * size
        for repeat in range(self.repeats):
            self.sampler.set_epoch(self.epoch * self.repeats + repeat)
            for index in self.sampler:
                yield index + size * shown[index]
                shown[index] += 1

    def indices(self, epoch: int, batch: int) -> list[int]:
        """Return the indices into the data set that a batch of an epoch has."""
        self.set_epoch(epoch, batch)
        return [number % len(self.sampler.dataset) for number in islice(self, self.batch_size)]

    def __len__(self) -> int:
        return len(self.sampler) * self.repeats


class TrainLoader:
    """Batches of one process for one epoch after the other."""

    def __init__(self, loader: DataLoader | PrefetchLoader, seeded: SeededDataset | None) -> None:
        self.loader = loader
        self._seeded = seeded

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images, targets) of an epoch from `first_batch` on."""
        if self._seeded is None:  # a stream of timm's, which counts epochs itself and can only be read from its start
            self.loader.dataset.set_epoch(epoch)
            yield from islice(self.loader, first_batch, None)
        else:
            self._seeded.epoch.fill_(epoch)
            self.loader.sampler.set_epoch(epoch, first_batch)
            yield from self.loader

    def sample_names(self, epoch: int, batch: int) -> list[str]:
        """Return the file names of the images in a batch, or what is known of them."""
        if self._seeded is None:
            return [f"batch {batch} of the stream"]
        return [_name(self._seeded.dataset, index) for index in self.loader.sampler.indices(epoch, batch)]

    def stop_mixup(self) -> None:
        """Switch off mixup that happens while collating; workers must start anew to notice."""
        if isinstance(self.loader, PrefetchLoader) and self.loader.mixup_enabled:
            self.loader.mixup_enabled = False
            self.loader.loader._iterator = None


def _name(dataset: Dataset, index: int) -> str:
    if isinstance(dataset, AugMixDataset):
        dataset = dataset.dataset
    if isinstance(dataset, ImageDataset):  # timm's
        return dataset.filename(index)
    files = getattr(dataset, "samples", None)  # torchvision's
    return str(files[index][0]) if files else f"image {index}"


def train_loader(
    dataset: Dataset,
    data_config: dict[str, Any],
    augmentation: dict[str, Any],
    *,
    batch_size: int,
    workers: int | None,
    device: torch.device,
    share: Share,
    seed: int,
    prefetch: bool,
    pin_memory: bool = False,
    collate_mixup: FastCollateMixup | None = None,
    aug_repeats: float = 0,
    aug_splits: int = 0,
    erase_only_augmented: bool = False,
    epoch_repeats: int = 0,
) -> TrainLoader:
    """Return shuffled, augmented batches.

    Args:
        dataset: Images, without a transform yet.
        data_config: timm's: input_size, mean, std.
        augmentation: Arguments of timm's ``create_transform``; ``re_…`` for random erasing.
        prefetch: Move and normalise batches on `device` ahead of their use.
        collate_mixup: Mixes images while collating; only with `prefetch`.
        aug_repeats: Copies of each image, augmented differently, spread over the processes; not of streams.
        aug_splits: Copies of each image in one batch: one clean, the others augmented; not of streams.
        epoch_repeats: Passes over the data in an epoch; streams bring their own.

    Raises:
        UserError: A batch is larger than the data.
    """
    erase = {key: value for key, value in augmentation.items() if key.startswith("re_")}
    erase["re_num_splits"] = (aug_splits or 2) if erase_only_augmented else 0
    if aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=aug_splits)
    dataset.transform = create_transform(
        data_config["input_size"],
        is_training=True,
        mean=data_config["mean"],
        std=data_config["std"],
        use_prefetcher=prefetch,
        separate=aug_splits > 1,
        **{**augmentation, **erase},
    )
    workers = _worker_count(workers)
    if isinstance(dataset, IterableImageDataset):
        dataset.set_loader_cfg(num_workers=workers)
        seeded = sampler = None
    else:
        seeded = SeededDataset(dataset, seed, share.rank)
        sampler = EpochSampler(_sampler(dataset, share, seed, aug_repeats), epoch_repeats, batch_size)
    loader = DataLoader(
        dataset if seeded is None else seeded,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=True,
        collate_fn=(collate_mixup or fast_collate) if prefetch else default_collate,
        num_workers=workers,
        worker_init_fn=partial(shield_worker, os.getpid()),
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        # Of its own, to keep the loader's hands off the global random state; streams are augmented by it.
        generator=torch.Generator().manual_seed(seed + share.rank),
    )
    if len(loader) == 0:
        images = len(dataset if sampler is None else sampler)
        raise UserError(f"--batch-size {batch_size} is more than the {images} training images of a process; lower it.")
    if prefetch:
        loader = PrefetchLoader(
            loader,
            mean=data_config["mean"],
            std=data_config["std"],
            channels=data_config["input_size"][0],
            device=device,
            **({} if augmentation.get("no_aug") else erase),
        )
    return TrainLoader(loader, seeded)


def _sampler(dataset: Dataset, share: Share, seed: int, aug_repeats: float) -> DistributedSampler | SeededRepeatSampler:
    if aug_repeats:
        return SeededRepeatSampler(dataset, share.world_size, share.rank, num_repeats=aug_repeats, seed=seed)
    return DistributedSampler(dataset, share.world_size, share.rank, seed=seed)


def eval_loader(
    dataset: Dataset,
    data_config: dict[str, Any],
    *,
    batch_size: int,
    workers: int | None,
    device: torch.device,
    share: Share = Share(),
    prefetch: bool,
    pin_memory: bool = False,
) -> DataLoader | PrefetchLoader:
    """Return batches in order; processes get equally many, the last ones padded with images seen already."""
    dataset.transform = create_transform(**data_config, use_prefetcher=prefetch)
    streaming = isinstance(dataset, IterableImageDataset)
    workers = _worker_count(workers)
    if streaming:
        dataset.set_loader_cfg(num_workers=workers)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=None if streaming else OrderedDistributedSampler(dataset, share.world_size, share.rank),
        collate_fn=fast_collate if prefetch else default_collate,
        generator=torch.Generator(),
        num_workers=workers,
        worker_init_fn=partial(shield_worker, os.getpid()),
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )
    if not prefetch:
        return loader
    channels = data_config["input_size"][0]
    return PrefetchLoader(loader, data_config["mean"], data_config["std"], channels=channels, device=device)


def _worker_count(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_DEFAULT_WORKERS, usable)
