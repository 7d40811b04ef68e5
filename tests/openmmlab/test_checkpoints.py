"""Checkpoints of mmengine: safe to read, never half written, old ones deleted last."""

import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import save_checkpoint
from mmengine.visualization import LocalVisBackend

import mambavision
from mambavision.errors import CheckpointError, OutputError
from mambavision.openmmlab.training.hooks import SafeCheckpointHook


def test_logs_and_settings_of_a_training_are_read(tmp_path):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = {
        "state_dict": {"weight": torch.ones(2)},
        "message_hub": {
            "log_scalars": {"train/loss": history},
            "runtime_info": {"iter": np.int64(3), "lr": np.float64(1)},
        },
        "meta": {"seed": 5, "dataset_meta": {"classes": ("a", "b"), "palette": [(1, 2, 3)]}},
    }
    save_checkpoint(content, str(tmp_path / "epoch_1.pth"))
    read = CheckpointLoader.load_checkpoint(str(tmp_path / "epoch_1.pth"), map_location="cpu", logger=None)
    assert read["message_hub"]["log_scalars"]["train/loss"].mean() == 1.5
    assert read["message_hub"]["runtime_info"]["iter"] == 3
    assert read["meta"] == content["meta"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"meta": 3},
        {"meta": {"epoch": -1}},
        {"meta": {"iter": "4"}},
        {"meta": {"seed": -1}},
        {"meta": {"seed": "five"}},
        {"meta": {"dataset_meta": ["a"]}},
        {"meta": {"dataset_meta": {"classes": "abc"}}},
        {"meta": {"CLASSES": [1, 2]}},
        {"meta": {"dataset_meta": {"classes": ["a"], "palette": [(0, 0, 256)]}}},
        {"meta": {"dataset_meta": {"PALETTE": "red"}}},
        {"optimizer": 3},
        {"optimizer": {"state": {}, "param_groups": "abc"}},
        {"param_schedulers": [3]},
        {"message_hub": [1]},
        {"message_hub": {"log_scalars": 3}},
    ],
    ids=str,
)
def test_impossible_metadata_are_said(wrong, tmp_path):
    path = tmp_path / "epoch_1.pth"
    mambavision.save_checkpoint({"state_dict": {"weight": torch.ones(1)}, **wrong}, path)
    with pytest.raises(CheckpointError, match=f"^{path}: .*must be") as refused:
        CheckpointLoader.load_checkpoint(str(path), logger=None)
    assert "\n" not in str(refused.value)


class _Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        _Attack(os.system, "touch canary"),
        _Attack(eval, "open('canary', 'w')"),
        _Attack(getattr, dict, "fromkeys"),
        _Attack(getattr, HistoryBuffer, "__init__"),
        _Attack(getattr, HistoryBuffer, "register_statistics"),
        _Attack(pickle.loads, pickle.dumps(1)),
    ],
    ids=["call", "eval", "attribute", "constructor", "method", "nested"],
)
def test_code_is_refused(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"weight": torch.ones(1)}, "meta": attack}, "epoch_1.pth")
    with pytest.raises(CheckpointError, match=r"epoch_1.pth: refused"):
        CheckpointLoader.load_checkpoint("epoch_1.pth", logger=None)
    assert os.listdir() == ["epoch_1.pth"]


def test_safetensors_are_read(tmp_path):
    mambavision.save_checkpoint({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    read = CheckpointLoader.load_checkpoint(str(tmp_path / "weights.safetensors"), logger=None)
    assert torch.equal(read["weight"], torch.ones(2))


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "epoch_1.pth"
    save_checkpoint({"state_dict": {}}, str(path))
    before = path.read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match=r"epoch_1\.pth: cannot be written \(No space left"):
        save_checkpoint({"state_dict": {"weight": torch.ones(100)}}, str(path))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["epoch_1.pth"]
    monkeypatch.undo()
    get_file_backend(str(path)).put_text("é", str(tmp_path / "text"))
    assert (tmp_path / "text").read_text(encoding="utf-8") == "é"


class _Runner:
    """As much of a runner as the hook needs; `fail_at` makes writing that file fail."""

    def __init__(self, work_dir):
        self.work_dir = str(work_dir)
        self.logger = SimpleNamespace(info=lambda message: None, warning=lambda message: None)
        self.message_hub = SimpleNamespace(runtime_info={})
        self.message_hub.update_info = self.message_hub.runtime_info.__setitem__
        self.message_hub.get_info = self.message_hub.runtime_info.get
        self.epoch, self.iter, self.seed, self.fail_at = 0, 0, 1, ""
        self.listings = []

    def save_checkpoint(self, out_dir, filename, *args, **kwargs):
        if filename == self.fail_at:
            raise OutputError("disk full")
        open(os.path.join(out_dir, filename), "w").close()
        self.listings.append(sorted(os.listdir(out_dir)))


@pytest.fixture
def runner(tmp_path):
    return _Runner(tmp_path)


def _epochs(hook, runner, metrics):
    for epoch, metric in enumerate(metrics):
        runner.epoch = epoch
        hook._save_checkpoint(runner)
        runner.epoch = epoch + 1
        hook.after_val_epoch(runner, {"mAP": metric})


def test_old_checkpoints_are_deleted_after_the_new_one_is_there(runner):
    hook = SafeCheckpointHook(max_keep_ckpts=1, save_best="mAP", rule="greater")
    hook.before_train(runner)
    _epochs(hook, runner, [0.1, 0.3, 0.2])
    assert sorted(os.listdir(runner.work_dir)) == ["best_mAP_epoch_2.pth", "epoch_3.pth", "last_checkpoint"]
    for listing in runner.listings[1:]:
        assert any(name.startswith("epoch_") for name in listing)
    assert any({"epoch_1.pth", "epoch_2.pth"} <= set(listing) for listing in runner.listings)
    assert any({"best_mAP_epoch_1.pth", "best_mAP_epoch_2.pth"} <= set(listing) for listing in runner.listings)


@pytest.mark.parametrize("file", ["epoch_2.pth", "best_mAP_epoch_2.pth"])
def test_failure_to_write_leaves_the_old_checkpoints(runner, file):
    hook = SafeCheckpointHook(max_keep_ckpts=1, save_best="mAP", rule="greater")
    hook.before_train(runner)
    runner.fail_at = file
    with pytest.raises(OutputError):
        _epochs(hook, runner, [0.1, 0.3])
    assert "best_mAP_epoch_1.pth" in os.listdir(runner.work_dir)
    assert any(name.startswith("epoch_") for name in os.listdir(runner.work_dir))


def test_several_best_checkpoints(runner):
    hook = SafeCheckpointHook(save_best=["a", "b"], rule="greater")
    hook.before_train(runner)
    for epoch, metrics in enumerate([{"a": 1, "b": 2}, {"a": 2, "b": 1}], 1):
        runner.epoch = epoch
        hook.after_val_epoch(runner, metrics)
    assert sorted(os.listdir(runner.work_dir)) == ["best_a_epoch_2.pth", "best_b_epoch_1.pth"]


def test_logs_are_json_that_everything_reads(tmp_path):
    vis = LocalVisBackend(str(tmp_path))
    vis.add_scalars({"loss": float("nan"), "norm": np.float32("inf"), "lr": 1e-3, "ids": np.arange(2)}, step=3)
    (line,) = (tmp_path / "scalars.json").read_text().splitlines()
    read = json.loads(line, parse_constant=pytest.fail)
    assert read == {"loss": None, "norm": None, "lr": 1e-3, "ids": [0, 1], "step": 3}
