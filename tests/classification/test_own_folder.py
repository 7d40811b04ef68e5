"""train.py: a run's folder is its own; two runs never share one."""

import os
import re
import shutil
from pathlib import Path

import pytest

from engine import run_folder
from engine.train import Trainer
from mambavision.errors import OutputError, UserError
from mambavision.running.folder_lock import LOCK, FolderLock


def content(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_folder_of_a_run_that_trains_is_left_alone(train, copy_of_run):
    """By its experiment, by --resume auto, by the name of its checkpoint, and by --resume never."""
    folder = copy_of_run("--epochs", "1", name="one")
    commands = [
        ["--experiment", "one"],
        ["--experiment", "one", "--resume", "auto"],
        ["--experiment", "one", "--resume", "never"],
        ["--resume", "auto"],
        ["--resume", folder / run_folder.LAST],
    ]
    with FolderLock() as lock:
        lock.acquire(folder, "")
        before = content(folder)
        for words in commands:
            with pytest.raises(UserError, match="one: another run of this process is training there") as error:
                train("--epochs", "2", *words)
            assert error.value.exit_status == 2
            assert content(folder) == before
    train("--epochs", "2", "--resume", "auto")
    assert not (folder / LOCK).exists()


def test_preempted_run_is_not_forgotten_while_it_still_trains(train):
    folder = train("--epochs", "1")
    run_folder.write_settings(folder, run_folder.read_settings(folder))
    with FolderLock() as lock:
        lock.acquire(folder, "")
        (folder / "unfinished.json").write_text("{}")
        assert train("--epochs", "1", "--resume", "never") != folder
        assert (folder / "unfinished.json").exists()


def test_starts_of_the_same_second(train, tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda pattern, *when: "20260101-000000")
    folder = Path("output/train/exp/20260101-000000-mamba_vision_T-32")
    new = run_folder.new_run_folder
    missed = iter([folder])  # the other start makes the folder between the look and the claim

    def look(*words):
        for other in missed:
            other.mkdir(parents=True)
            return other
        return new(*words)

    monkeypatch.setattr(run_folder, "new_run_folder", look)
    train("--epochs", "1")
    assert os.listdir(folder) == []
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}-2"}


def test_what_fails_before_the_work_leaves_no_folder(train, tmp_path):
    with pytest.raises(UserError):
        train("--experiment", "one", "--resume", tmp_path / "missing.pth.tar")
    with pytest.raises(UserError):
        train("--experiment", "one", "--initial-checkpoint", tmp_path / "missing.pth.tar")
    assert not Path("output").exists()


@pytest.mark.parametrize("words", [["--tag", "t" * 300], ["--experiment", "é" * 150], ["--output", "o" * 300]])
def test_names_that_are_too_long(train, tmp_path, words):
    with pytest.raises(OutputError, match=r"cannot be written \(File name too long\); choose a shorter one"):
        train(*words)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("moment", ["_train_epoch", "_save", "_scores"])
def test_folder_that_is_deleted_underfoot(train, monkeypatch, moment):
    original = getattr(Trainer, moment)

    def delete(self, *words, **others):
        shutil.rmtree(self.folder, ignore_errors=True)
        return original(self, *words, **others)

    monkeypatch.setattr(Trainer, moment, delete)
    with pytest.raises(OutputError, match=re.escape("exp/one: was deleted or moved while this run was writing there")):
        train("--experiment", "one", "--recovery-interval", "1", "--epochs", "3")
    assert not Path("output/train/exp/one").exists()
