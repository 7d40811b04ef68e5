"""Batches of training: their order and augmentation."""

import random

import numpy as np
import pytest
import torch
from batch_samples import CONFIG, equal
from PIL import Image

from engine import data
from engine.batches import train_loader
from mambavision.errors import UserError
from mambavision.running.group import Group
from mambavision.running.process import Process

AUGMENTATION = {
    "scale": (0.5, 1.0),
    "ratio": (0.75, 1.33),
    "hflip": 0.5,
    "color_jitter": 0.4,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.5,
    "re_mode": "pixel",
}


def test_strongest_published_augmentation_works():
    """Some pairs of timm and Pillow versions fail on extreme levels, that is, once in thousands of images."""
    from timm.data.auto_augment import AugmentOp

    image = Image.linear_gradient("L").convert("RGB")
    for level in (0, 10):
        assert AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=level)(image).size == image.size


def train_batches(digits, workers=0, rank=0, world_size=1, epoch=0, first_batch=0, **kwargs):
    split = data.open_split(data_dir=str(digits), split="train", is_training=True)
    options = {"batch_size": 8, "seed": 5, "prefetch": False, **kwargs}
    group = Group(Process(rank, 0, world_size))
    loader = train_loader(split, CONFIG, dict(AUGMENTATION), workers=workers, group=group, **options)
    return list(loader.epoch(epoch, first_batch))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(digits, workers):
    assert equal(train_batches(digits), train_batches(digits, workers))


def test_batches_depend_on_epoch_seed_and_process(digits):
    first = train_batches(digits)
    assert equal(first, train_batches(digits))
    assert not equal(first, train_batches(digits, epoch=1))
    assert not equal(first, train_batches(digits, seed=6))


def test_workers_notice_the_epoch(digits):
    split = data.open_split(data_dir=str(digits), split="train", is_training=True)
    loader = train_loader(
        split, CONFIG, dict(AUGMENTATION), batch_size=8, seed=5, prefetch=False, workers=1,
        group=Group(),
    )  # fmt: skip
    for epoch in (0, 1):
        assert equal(list(loader.epoch(epoch)), train_batches(digits, epoch=epoch))


def test_an_epoch_can_be_taken_up_in_its_middle(digits):
    assert equal(train_batches(digits, epoch=3)[4:], train_batches(digits, epoch=3, first_batch=4, workers=2))


def test_loading_leaves_the_random_state_of_the_process_alone(digits):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    train_batches(digits)
    drawn = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    assert drawn == (torch.rand(1).item(), np.random.rand(), random.random())


def test_processes_share_the_images_of_an_epoch(digits):
    def shown(batches):
        return torch.cat([targets for _, targets in batches])

    shares = [train_batches(digits, rank=rank, world_size=2, batch_size=10) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    assert shown(shares[0] + shares[1]).bincount().tolist() == [20, 20, 20]


def test_repeats(digits):
    assert len(train_batches(digits, epoch_repeats=2)) == 2 * len(train_batches(digits, batch_size=8)) + 1
    assert len(train_batches(digits, aug_repeats=2)) == 7


@pytest.mark.parametrize(
    ("options", "images"), [({"epoch_repeats": 3}, 180), ({"aug_repeats": 3}, 60), ({"aug_repeats": 1.5}, 60)]
)
def test_repeated_images_are_augmented_differently(digits, options, images):
    batches = train_batches(digits, batch_size=6, **options)
    assert len({image.numpy().tobytes() for batch, _ in batches for image in batch}) == images
    middle = len(batches) // 2
    assert equal(batches[middle:], train_batches(digits, batch_size=6, first_batch=middle, workers=1, **options))


def test_repeated_images_follow_the_seed(digits):
    def order(seed):
        return [targets.tolist() for _, targets in train_batches(digits, aug_repeats=2, seed=seed)]

    assert order(1) == order(1) != order(2)


def test_batches_larger_than_the_data_are_refused(digits):
    with pytest.raises(UserError, match="--batch-size 64 exceeds the 60 training images of a process"):
        train_batches(digits, batch_size=64)
