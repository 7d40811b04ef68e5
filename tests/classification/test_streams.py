"""timm's data sets and streams."""

import numpy as np
import pytest
from batch_samples import CONFIG, equal
from PIL import Image
from timm.data import FastCollateMixup, IterableImageDataset

from engine import data
from engine.batches import eval_loader, train_loader
from engine.checks import check_options
from engine.options import TrainOptions
from mambavision.errors import UserError
from mambavision.running.group import Group
from mambavision.running.process import Process


def test_options_that_timms_data_sets_do_not_know_are_refused():
    for words in (["--skip-corrupt"], ["--exif-transpose"]):
        check_options(TrainOptions.parse(words), Group())
        with pytest.raises(UserError, match=f"{words[0]} .* image folders only; remove it, or --dataset torch/x"):
            check_options(TrainOptions.parse(["--dataset", "torch/x", *words]), Group())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "hfids/x", "--aug-repeats", "2"], "--aug-repeats and --aug-splits need single images"),
        (["--dataset", "TFDS/x", "--aug-splits", "2", "--mixup=0", "--cutmix=0"], "need single images"),
        (["--dataset", "wds/x", "--epoch-repeats", "2"], "--epoch-repeats has no effect on wds/ streams"),
        (["--log-wandb"], "pip install wandb"),
    ],
)
def test_impossible_options_are_refused_before_any_work(words, message, monkeypatch):
    monkeypatch.setattr("engine.checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        check_options(TrainOptions.parse(words), Group())
    check_options(TrainOptions.parse(["--aug-repeats", "2", "--epoch-repeats", "2"]), Group())


@pytest.mark.parametrize(("rank", "local_rank", "turn"), [(0, 0, 0), (1, 1, 2), (2, 0, 1)])
def test_the_first_process_downloads_first(monkeypatch, rank, local_rank, turn):
    """Then one process of every other machine, and then those that find the files."""
    events = []
    monkeypatch.setattr(data, "this_process", lambda: Process(rank, local_rank, world_size=4))
    monkeypatch.setattr(data, "create_dataset", lambda *args, **kwargs: events.append("download") or "data set")
    monkeypatch.setattr("torch.distributed.new_group", lambda **kwargs: "group")
    monkeypatch.setattr("torch.distributed.barrier", lambda group: events.append("barrier"))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda group: None)
    assert data.open_split(data_dir="x", split="train", dataset="torch/mnist", download=True) == "data set"
    assert events.index("download") == turn
    assert events.count("barrier") == 3


# Streams


class Reader:
    """What timm's streams read from."""

    workers = None

    def __iter__(self):
        for number in range(40):
            yield Image.fromarray(np.full((32, 32), 6 * number, np.uint8)).convert("RGB"), number % 3

    def __len__(self):
        return 40

    def set_loader_cfg(self, num_workers):
        self.workers = num_workers


def stream_batches(workers=0, prefetch=True, **kwargs):
    stream = IterableImageDataset("", reader=Reader())
    loader = train_loader(
        stream, CONFIG, {"no_aug": True}, batch_size=8, seed=5, prefetch=prefetch, workers=workers,
        group=Group(), **kwargs,
    )  # fmt: skip
    return loader, stream.reader


def test_streams_are_mixed_while_collating():
    loader, _ = stream_batches(collate_mixup=FastCollateMixup(num_classes=3))
    for images, targets in loader.epoch(0):
        assert images.shape == (8, 3, 32, 32)
        assert targets.shape == (8, 3)


def test_streams_can_be_taken_up_in_the_middle():
    loader, _ = stream_batches(prefetch=False)
    assert equal(list(loader.epoch(0))[3:], list(loader.epoch(0, first_batch=3)))


@pytest.mark.parametrize("workers", [0, 1, None])
def test_streams_are_told_the_number_of_workers(workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    loader, reader = stream_batches(workers)
    assert reader.workers == loader.loader.loader.num_workers == (2 if workers is None else workers)
    stream = IterableImageDataset("", reader=Reader())
    loader = eval_loader(stream, CONFIG, batch_size=8, workers=workers, group=Group(), prefetch=False)
    assert stream.reader.workers == loader.num_workers == (2 if workers is None else workers)


def test_streams_smaller_than_a_batch_are_refused():
    with pytest.raises(UserError, match="--batch-size 64 exceeds the 40 training images of a process"):
        train_loader(
            IterableImageDataset("", reader=Reader()), CONFIG, {}, batch_size=64, seed=5, prefetch=False, workers=0,
            group=Group(),
        )  # fmt: skip
