"""Training data whose order and augmentation depend on seed, epoch and process alone."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader

from mambavision.openmmlab.training.batches import ViewBatches, exact_loader
from mambavision.running.sampling import SampleView


class Noise:
    """Random numbers of all three generators, of pictures that are high and wide in turn."""

    metainfo = ("a", "b")
    pipeline = "first"

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(1).item()

    def get_data_info(self, index):
        return {"width": 2 + index % 2, "height": 3 - index % 2}


def loader(sampler, endless, workers=0, seed=5, rank=0, kind=BatchSampler):
    batches = kind(sampler(Noise(), seed=3), 2, False)
    other = DataLoader(batches.sampler.dataset, batch_sampler=batches, collate_fn=list, num_workers=workers)
    return exact_loader(other, seed, rank, endless)


def batches(loader, epoch=0, first=0, count=None):
    loader.batch_sampler.start(epoch, first)
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_an_epoch_can_begin_anywhere(first):
    random_state = random.getstate(), torch.get_rng_state()
    whole = batches(loader(DefaultSampler, endless=False), epoch=2)
    assert sorted(index for batch in whole for index, *_ in batch) == list(range(7))
    assert batches(loader(DefaultSampler, endless=False, workers=2), epoch=2, first=first) == whole[first:]
    assert random_state[0] == random.getstate()
    assert torch.equal(random_state[1], torch.get_rng_state())


@pytest.mark.parametrize("sampler", [DefaultSampler, InfiniteSampler])
def test_a_stream_can_begin_anywhere(sampler):
    whole = batches(loader(sampler, endless=True), count=20)
    assert len({numbers for batch in whole for _, *numbers in batch for numbers in numbers}) == sum(map(len, whole)) * 3
    again = loader(sampler, endless=True)
    for first in (9, 0):
        assert batches(again, first=first, count=20 - first) == whole[first:]


def test_numbers_differ():
    def numbers(epoch=0, **options):
        return {number for batch in batches(loader(DefaultSampler, False, **options), epoch) for _, number, *_ in batch}

    same, *others = numbers(), numbers(epoch=1), numbers(seed=6), numbers(rank=1)
    assert same == numbers(workers=1)
    assert all(same.isdisjoint(other) for other in others)


def test_batches_of_one_shape():
    from mmdet.datasets import AspectRatioBatchSampler

    whole = batches(loader(DefaultSampler, False, kind=AspectRatioBatchSampler), epoch=1)
    assert all(len({index % 2 for index, *_ in batch}) == 1 for batch in whole[:3])
    assert batches(loader(DefaultSampler, False, kind=AspectRatioBatchSampler), epoch=1, first=2) == whole[2:]


def test_hooks_find_what_they_look_for():
    ours = loader(DefaultSampler, endless=False)
    assert not [*ours]  # nothing before the loop says where to start
    assert len(ours) == 4
    assert ours.batch_sampler.sampler.seed == 3
    assert ours.dataset.metainfo == Noise.metainfo
    ours.dataset.pipeline = "second"
    assert ours.dataset._dataset.pipeline == "second"
    assert pickle.loads(pickle.dumps(ours.dataset)).pipeline == "second"  # as for workers that are spawned
    with pytest.raises(AttributeError):
        _ = ours.dataset.absent


def test_indices_of_several_numbers():
    class Frames(BatchSampler):
        def __iter__(self):
            yield [(0, 4), (0, 4)]

    showings = ViewBatches(Frames(DefaultSampler(Noise(), seed=3), 2, False), endless=False)
    showings.start(0, 0)
    assert [*showings] == [[SampleView(0, 0, (0, 4)), SampleView(0, 1, (0, 4))]]
