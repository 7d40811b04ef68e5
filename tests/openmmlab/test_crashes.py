"""Runs of OpenMMLab that are killed while they write a checkpoint."""

import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine import Config
from mmengine.logging import MessageHub
from mmengine.runner.checkpoint import save_checkpoint

from crashes import count_points, killed_after, killed_at, point_of
from mambavision.openmmlab.training import resume
from mambavision.openmmlab.training.hooks import SafeCheckpointHook
from mambavision.running.newest import STARTED
from mambavision.running.record import RECORD, begin, finish, mark_preempted

_EPOCHS = 4
OPTIMIZER = {"state": {}, "param_groups": []}


class _Runner:
    """As much of a runner as the hook asks for; checkpoints are real."""

    def __init__(self, work_dir):
        self.work_dir = str(work_dir)
        self.message_hub = MessageHub("crashes")
        self.logger = SimpleNamespace(info=lambda text: None)
        self.epoch = self.iter = 0

    def save_checkpoint(self, out_dir, filename, *args, meta, **kwargs):
        weight = torch.full((20_000,), float(meta["epoch"]))
        content = {"meta": meta, "state_dict": {"weight": weight}, "optimizer": OPTIMIZER, "message_hub": {}}
        save_checkpoint(content, os.path.join(out_dir, filename))


def train(work_dir, first=0, report=lambda epoch: None):
    """Save a checkpoint after each epoch, which is reported before, and keep the newest and the best."""
    runner = _Runner(work_dir)
    hook = SafeCheckpointHook(max_keep_ckpts=1, save_best="score", rule="greater")
    hook.before_train(runner)
    for epoch in range(first, _EPOCHS):
        report(epoch + 1)
        runner.epoch = epoch
        hook._save_checkpoint(runner)
        runner.epoch = epoch + 1
        hook.after_val_epoch(runner, {"score": [1, 3, 2, 4][epoch]})


def to_resume(work_dir, given=None, **config):
    """Return what a config and --resume make of a folder."""
    return resume.find(work_dir, resume.requested(Config(config), given))


def go_on(work_dir):
    """Go on as a new process does; return how many epochs were found."""
    found = to_resume(work_dir, "auto")
    resume.begin_record(work_dir, "auto", is_new=found is None)
    done = 0
    if found is not None:
        path, content = found
        done = content["meta"]["epoch"]
        assert (content["state_dict"]["weight"] == done).all()
        assert Path(path).name == f"epoch_{done}.pth"
    assert not [*work_dir.glob(".*")]
    train(work_dir, first=done)
    assert "epoch_4.pth" in os.listdir(work_dir)
    return done


def kill_at_a_point(folder, seed, rounds):
    work_dir, counted = folder / "killed", folder / "counted"
    for each in (work_dir, counted):
        each.mkdir()
    point = point_of(seed, rounds, count_points(lambda report: train(counted)))
    was_killed, begun = killed_at(point, lambda report: train(work_dir, report=report))
    assert was_killed
    assert go_on(work_dir) >= max(begun, default=0) - 1


def kill_at_any_time(folder, seed):
    work_dir, timed = folder / "killed", folder / "timed"
    for each in (work_dir, timed):
        each.mkdir()
    started = time.monotonic()
    train(timed)
    seconds = random.Random(seed).uniform(0, time.monotonic() - started)
    _, begun = killed_after(seconds, lambda report: train(work_dir, report=report))
    assert go_on(work_dir) >= max(begun, default=0) - 1


# Many more rounds are in tests/long/killed_writing.py.


@pytest.mark.parametrize("seed", range(6))
def test_run_killed_at_a_point_of_writing_goes_on(tmp_path, seed):
    kill_at_a_point(tmp_path, seed, rounds=6)


@pytest.mark.parametrize("seed", range(3))
def test_run_killed_at_any_time_goes_on(tmp_path, seed):
    kill_at_any_time(tmp_path, seed)


def checkpoint(path, start=None, **meta):
    hub = {"runtime_info": {STARTED: time.time() if start is None else start}}
    save_checkpoint({"meta": meta, "state_dict": {}, "optimizer": OPTIMIZER, "message_hub": hub}, str(path))


def test_what_a_preempted_run_left_goes_first(tmp_path, caplog):
    begin(tmp_path, "", is_new=True)
    checkpoint(tmp_path / "iter_4.pth", iter=4)
    checkpoint(tmp_path / "iter_8.pth", iter=8)
    mark_preempted(tmp_path)

    def found(resume=None):
        path, content = to_resume(tmp_path, resume)
        assert path == str(tmp_path / ("recovery.pth" if content["meta"]["iter"] == 9 else "iter_8.pth"))
        return content["meta"]["iter"]

    assert found() == 8
    checkpoint(tmp_path / "recovery.pth", iter=9)
    assert found() == found("auto") == found(str(tmp_path)) == 9
    assert to_resume(tmp_path, "never") is None
    whole = (tmp_path / "recovery.pth").read_bytes()
    (tmp_path / "recovery.pth").write_bytes(whole[: len(whole) // 2])
    assert found() == 8
    assert "recovery.pth: cannot be read as a checkpoint" in caplog.text
    (tmp_path / "recovery.pth").write_bytes(whole)
    os.utime(tmp_path / "recovery.pth", (1, 1))  # times do not matter
    assert found() == 9
    checkpoint(tmp_path / "iter_8.pth", iter=10)  # other hooks than ours do not delete it
    assert to_resume(tmp_path)[1]["meta"]["iter"] == 10
    finish(tmp_path)
    assert to_resume(tmp_path) is None


def test_other_checkpoints_of_the_folder_are_not_taken_for_the_preempted_run(tmp_path):
    checkpoint(tmp_path / "epoch_12.pth", start=1.0, epoch=12)
    begin(tmp_path, "", is_new=True)
    mark_preempted(tmp_path)
    assert to_resume(tmp_path) is None
    checkpoint(tmp_path / "epoch_2.pth", epoch=2)
    assert to_resume(tmp_path)[0].endswith("epoch_2.pth")


def test_run_that_started_from_a_file_goes_on_from_its_own(tmp_path):
    checkpoint(tmp_path / "old.pth", epoch=3)
    work_dir = tmp_path / "run"
    work_dir.mkdir()
    assert to_resume(work_dir, str(tmp_path / "old.pth"))[1]["meta"]["epoch"] == 3
    begin(work_dir, str(tmp_path / "old.pth"), is_new=True)
    mark_preempted(work_dir)
    assert to_resume(work_dir, str(tmp_path / "old.pth"))[1]["meta"]["epoch"] == 3  # nothing of its own yet
    checkpoint(work_dir / "recovery.pth", epoch=5)
    assert to_resume(work_dir, str(tmp_path / "old.pth"))[1]["meta"]["epoch"] == 5


def test_configs_resume_as_in_mmengine(tmp_path):
    checkpoint(tmp_path / "epoch_2.pth", epoch=2)
    checkpoint(tmp_path / "other.pth", epoch=7)
    assert to_resume(tmp_path, load_from=str(tmp_path / "other.pth")) is None
    assert to_resume(tmp_path, resume=True)[1]["meta"]["epoch"] == 2
    config = {"resume": True, "load_from": str(tmp_path / "other.pth")}
    assert to_resume(tmp_path, **config)[1]["meta"]["epoch"] == 7
    assert to_resume(tmp_path, "never", **config) is None


def test_a_new_run_takes_nothing_over(tmp_path):
    for name in ("iter_4.pth", "recovery.pth", ".iter_8.pth.12.tmp", ".hidden"):
        (tmp_path / name).touch()
    resume.begin_record(tmp_path, "", is_new=False)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "iter_4.pth", "recovery.pth", RECORD]
    resume.begin_record(tmp_path, "", is_new=True)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "iter_4.pth", RECORD]
