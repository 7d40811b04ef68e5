"""Batches of images whose order and augmentation depend on seed, epoch and process only.

The augmentation of an image is derived from (seed, epoch, process, index, number of earlier views in the epoch), and
the order of an epoch from (seed, epoch), so that neither the number of workers nor an interruption changes what a run
sees.
There are two exceptions: timm's streams have their own order, and its prefetcher (on GPUs, and with --aug-splits)
applies random erasing in the main process, one batch ahead.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from timm.data import AugMixDataset, FastCollateMixup, ImageDataset, IterableImageDataset, Mixup, create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, DistributedSampler, Sampler, default_collate

from engine.data import ImageData
from engine.options import TrainOptions
from engine.options.train import AugmentationOptions
from mambavision.errors import UserError
from mambavision.running.group import Group
from mambavision.running.sampling import SampleView, SeededDataset, ViewCounter
from mambavision.running.signals import shield_worker

_DEFAULT_WORKERS = 8


def _entropy(view: SampleView, seed: int, rank: int, size: int) -> tuple[int, ...]:
    return seed, view.epoch, rank, view.index + size * view.times


class SeededRepeatSampler(RepeatAugSampler):
    """timm's sampler of repeated images, whose order also depends on a seed, as in torch's samplers."""

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed + epoch)


class EpochSampler(Sampler):
    """Repeats a sampler within an epoch, and can start at a later batch; yields `SampleView`s."""

    def __init__(self, sampler: DistributedSampler | SeededRepeatSampler, repeats: int, batch_size: int) -> None:
        self.sampler = sampler
        self.repeats = max(1, repeats)
        self.batch_size = batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[SampleView]:
        return islice(self._whole_epoch(), self.first_batch * self.batch_size, None)

    def _whole_epoch(self) -> Iterator[SampleView]:
        counter = ViewCounter(self.epoch)
        for repeat in range(self.repeats):
            self.sampler.set_epoch(self.epoch * self.repeats + repeat)
            yield from map(counter.view, self.sampler)

    def indices(self, epoch: int, batch: int) -> list[int]:
        """Return the indices into the data set of one batch of an epoch."""
        self.set_epoch(epoch, batch)
        return [view.index for view in islice(self, self.batch_size)]

    def __len__(self) -> int:
        return len(self.sampler) * self.repeats


class TrainLoader:
    """Training batches of one process, epoch by epoch.

    Args:
        loader: The data loader.
        images: The data set; None for one of timm's streams, whose samples have no index.
    """

    def __init__(self, loader: DataLoader | PrefetchLoader, images: ImageData | None) -> None:
        self.loader: Any = loader  # its data set and sampler have more methods than torch's types
        self._images = images

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images, targets) of an epoch, starting at `first_batch`."""
        if self._images is None:  # a stream counts epochs itself and can only be read from its start
            self.loader.dataset.set_epoch(epoch)
            yield from islice(self.loader, first_batch, None)
        else:
            self.loader.sampler.set_epoch(epoch, first_batch)
            yield from self.loader

    def sample_names(self, epoch: int, batch: int) -> list[str]:
        """Return the file names of the images in a batch, as far as they are known."""
        if self._images is None:
            return [f"batch {batch} of the stream"]
        return [_name(self._images, index) for index in self.loader.sampler.indices(epoch, batch)]

    def stop_mixup(self) -> None:
        """Switch off mixup in the collate function; workers must be restarted to notice."""
        if isinstance(self.loader, PrefetchLoader) and self.loader.mixup_enabled:
            self.loader.mixup_enabled = False
            self.loader.loader._iterator = None


def _name(dataset: ImageData, index: int) -> str:
    if isinstance(dataset, AugMixDataset):
        dataset = dataset.dataset
    if isinstance(dataset, ImageDataset):  # timm's
        return dataset.filename(index)
    files = getattr(dataset, "samples", None)  # torchvision's
    return str(files[index][0]) if files else f"image {index}"


def train_loader(
    dataset: ImageData,
    data_config: dict[str, Any],
    augmentation: dict[str, Any],
    *,
    batch_size: int,
    workers: int | None,
    group: Group,
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
        group: All processes, among which the images are divided.
        prefetch: Move batches to the device and normalise them there, one batch ahead.
        collate_mixup: Collate function that mixes images; only with `prefetch`.
        aug_repeats: Differently augmented copies of each image, spread over the processes; not for streams.
        aug_splits: Copies of each image in one batch: one clean, the others augmented; not for streams.
        epoch_repeats: Passes over the data in an epoch; streams have their own.

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
        sampler = images = None
    else:
        images = SeededDataset(dataset, seed, group.rank, _entropy)
        sampler = EpochSampler(_sampler(dataset, group, seed, aug_repeats), epoch_repeats, batch_size)
    loader = DataLoader(
        dataset if images is None else images,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=True,
        collate_fn=(collate_mixup or fast_collate) if prefetch else default_collate,
        num_workers=workers,
        worker_init_fn=partial(shield_worker, os.getpid()),
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        # Its own generator, so that the loader does not touch the global random state; streams use it to augment.
        generator=torch.Generator().manual_seed(seed + group.rank),
    )
    if len(loader) == 0:
        count = len(dataset if sampler is None else sampler)
        raise UserError(f"--batch-size {batch_size} exceeds the {count} training images of a process; lower it.")
    is_indexed = images is not None
    if not prefetch:
        return TrainLoader(loader, dataset if is_indexed else None)
    prefetched = PrefetchLoader(
        loader,
        mean=data_config["mean"],
        std=data_config["std"],
        channels=data_config["input_size"][0],
        device=group.device,
        **({} if augmentation.get("no_aug") else erase),
    )
    return TrainLoader(prefetched, dataset if is_indexed else None)


def _sampler(
    dataset: ImageData, group: Group, seed: int, aug_repeats: float
) -> DistributedSampler | SeededRepeatSampler:
    if aug_repeats:
        return SeededRepeatSampler(dataset, group.size, group.rank, num_repeats=aug_repeats, seed=seed)
    return DistributedSampler(dataset, group.size, group.rank, seed=seed)


def eval_loader(
    dataset: ImageData,
    data_config: dict[str, Any],
    *,
    batch_size: int,
    workers: int | None,
    group: Group,
    prefetch: bool,
    pin_memory: bool = False,
) -> DataLoader | PrefetchLoader:
    """Return batches in order; all processes get the same number, padded with repeated images at the end."""
    dataset.transform = create_transform(**data_config, use_prefetcher=prefetch)
    streaming = isinstance(dataset, IterableImageDataset)
    workers = _worker_count(workers)
    if streaming:
        dataset.set_loader_cfg(num_workers=workers)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=None if streaming else OrderedDistributedSampler(dataset, group.size, group.rank),
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
    return PrefetchLoader(loader, data_config["mean"], data_config["std"], channels=channels, device=group.device)


def _worker_count(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_DEFAULT_WORKERS, usable)


def mixup_is_on(options: AugmentationOptions) -> bool:
    """Return True if training images are mixed."""
    return options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None


@dataclass
class Batches:
    """Batches of a training run."""

    train: TrainLoader
    validation: DataLoader | PrefetchLoader
    mixup: Mixup | None  # mixes in the training process; None if mixup is off or part of collating


def build_batches(
    options: TrainOptions,
    data_config: dict[str, Any],
    num_classes: int,
    train: ImageData,
    validation: ImageData,
    group: Group,
) -> Batches:
    """Create the loaders of train.py.

    Args:
        options: Options of train.py.
        data_config: timm's.
        num_classes: Classes of the model.
        train: Training images.
        validation: Validation images.
        group: All processes.
    """
    data, augmentation = options.data, options.augmentation
    # On a CPU, normalising in workers is cheaper; to a GPU, batches are transferred as bytes. The prefetcher erases
    # parts of mixed images, workers those of single images.
    prefetch = (group.device.type != "cpu" or augmentation.aug_splits > 1) and not data.no_prefetcher
    mixup = _mixup(augmentation, num_classes, prefetch) if mixup_is_on(augmentation) else None
    validation_batch_size = options.model.validation_batch_size or options.model.batch_size
    common: dict[str, Any] = {
        "workers": data.workers,
        "group": group,
        "prefetch": prefetch,
        "pin_memory": data.pin_mem and group.device.type != "cpu",
    }
    train_batches = train_loader(
        train,
        data_config,
        {
            "no_aug": augmentation.no_aug,
            "scale": augmentation.scale,
            "ratio": augmentation.ratio,
            "hflip": augmentation.hflip,
            "vflip": augmentation.vflip,
            "color_jitter": augmentation.color_jitter,
            "auto_augment": augmentation.aa or None,
            "interpolation": augmentation.train_interpolation,
            "re_prob": augmentation.reprob,
            "re_mode": augmentation.remode,
            "re_count": augmentation.recount,
        },
        batch_size=options.model.batch_size,
        seed=options.run.seed,
        collate_mixup=mixup if isinstance(mixup, FastCollateMixup) else None,
        aug_repeats=augmentation.aug_repeats,
        aug_splits=augmentation.aug_splits,
        erase_only_augmented=augmentation.resplit,
        epoch_repeats=data.epoch_repeats,
        **common,
    )
    validation_batches = eval_loader(validation, data_config, batch_size=validation_batch_size, **common)
    return Batches(train_batches, validation_batches, None if prefetch else mixup)


def _mixup(options: AugmentationOptions, num_classes: int, collates: bool) -> Mixup:
    return (FastCollateMixup if collates else Mixup)(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )
