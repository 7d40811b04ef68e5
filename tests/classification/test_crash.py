"""SIGKILL while train.py writes checkpoints: whatever was finished before can be gone on from."""

import errno
import os
import random
import time

import pytest
import torch

from crashes import count_points, killed_after, killed_at, point_of
from engine import run_folder
from mambavision.checkpoint import read_checkpoint, save_checkpoint
from mambavision.files import remove_temporaries
from mambavision.running.newest import newest_valid

EPOCHS = range(1, 5)  # after epoch 0
METRICS = [50.0, 60.0, 55.0, 70.0, 65.0]


def finish_epoch(folder, checkpoints, epoch):
    """Save inside the epoch and at its end."""
    state = {"state_dict": {"weight": torch.full((5000,), float(epoch))}}
    if epoch:
        save_checkpoint(state | {"epoch": epoch, "next_batch": 3}, folder / run_folder.RECOVERY)
    is_best = checkpoints.rank(epoch, METRICS[epoch])
    saved = state | {"epoch": epoch, "next_batch": None, "checkpoints": checkpoints.state(), "metric": METRICS[epoch]}
    checkpoints.write(saved, epoch, is_best)


def begin(folder):
    checkpoints = run_folder.Checkpoints(folder, keep=2, lower_is_better=False)
    finish_epoch(folder, checkpoints, 0)

    def work(report):
        for epoch in EPOCHS:
            finish_epoch(folder, checkpoints, epoch)
            report(epoch)

    return work


def check(folder, finished):
    """What can be gone on from is whole and not older than one interval; the best weights are there; nothing stays."""
    path, newest = newest_valid(run_folder.checkpoints_in(folder))
    assert newest["epoch"] >= max(finished, default=0)
    assert (newest["state_dict"]["weight"] == newest["epoch"]).all(), path
    best = read_checkpoint(folder / run_folder.BEST)
    assert best["metric"] >= max(METRICS[: max(finished, default=0) + 1])
    remove_temporaries(folder)
    assert not list(folder.glob(".*"))
    checkpoints = run_folder.Checkpoints(folder, keep=2, lower_is_better=False)
    if "checkpoints" in newest:
        checkpoints.load_state(newest["checkpoints"])
    finish_epoch(folder, checkpoints, 4)
    assert read_checkpoint(folder / run_folder.LAST)["epoch"] == 4


def kill_at_a_point(folder, seed, rounds):
    point = point_of(seed, rounds, count_points(begin(folder / "count")))
    was_killed, finished = killed_at(point, begin(folder / "killed"))
    assert was_killed
    check(folder / "killed", finished)


def kill_at_any_time(folder, seed):
    work, started = begin(folder / "time"), time.monotonic()
    work(lambda epoch: None)
    duration = time.monotonic() - started
    _, finished = killed_after(random.Random(seed).uniform(0, duration), begin(folder / "killed"))
    check(folder / "killed", finished)


@pytest.fixture
def no_links(monkeypatch):
    """A file system without links, where checkpoints are copied."""

    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


# Many more rounds are in tests/long/killed_writing.py.


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_point_of_writing(tmp_path, seed):
    kill_at_a_point(tmp_path, seed, rounds=6)


@pytest.mark.parametrize("seed", range(2))
def test_killed_while_copying(tmp_path, no_links, seed):
    kill_at_a_point(tmp_path, seed, rounds=2)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_time(tmp_path, seed):
    kill_at_any_time(tmp_path, seed)
