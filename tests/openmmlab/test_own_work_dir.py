"""Work dirs of OpenMMLab's tasks: of one run at a time, whatever ends it."""

import shutil

import pytest
from test_preempted_runs import TASKS, data  # noqa: F401

from checkout import ROOT
from mambavision.errors import IO_FAILURE, USAGE
from mambavision.openmmlab.training.hooks import OwnFolderHook
from mambavision.running.folder_lock import LOCK, FolderLock
from ranks import run_ranks


@pytest.fixture
def train(data):  # noqa: F811
    def start(task, work_dir, *words, ranks=1, **environment):
        words = [ROOT / "tests" / "openmmlab" / TASKS[task], "--work-dir", work_dir, *words]
        return run_ranks(ROOT / task / "tools" / "train.py", words, f"{work_dir}.log", ranks, **data, **environment)

    return start


@pytest.mark.parametrize(("task", "ranks"), [("object_detection", 1), ("semantic_segmentation", 2)])
def test_work_dir_of_a_run_that_trains_is_left_alone(task, ranks, train, tmp_path):
    work_dir = tmp_path / "run"
    with FolderLock() as lock:
        lock.acquire(work_dir, "")
        for words in ([], ["--resume"]):
            refused = train(task, work_dir, *words, ranks=ranks)
            assert [finished.status for finished in refused] == [USAGE] * ranks, refused[0].output
            errors = [line for finished in refused for line in finished.output.splitlines() if "error" in line]
            assert len(errors) == 1
            assert "is training there; wait for it or end it, or give another --work-dir." in errors[0]
            assert not any("Traceback" in finished.output for finished in refused)
            assert [path.name for path in work_dir.iterdir()] == [LOCK]


@pytest.mark.parametrize("task", TASKS)
def test_work_dir_that_is_deleted_underfoot(task, train, tmp_path):
    work_dir = tmp_path / "run"
    (finished,) = train(task, work_dir, DISTURB="train 2 delete 0")
    assert finished.status == IO_FAILURE, finished.output
    assert finished.output.splitlines()[-1].startswith(f"error: {work_dir}: was deleted or moved while this run")
    assert "Traceback" not in finished.output
    assert not list(work_dir.glob("*.pth"))
    assert not (work_dir / "unfinished.json").exists()


def test_names_that_are_too_long(train, tmp_path):
    (finished,) = train("object_detection", tmp_path / "run", "--work-dir", tmp_path / ("x" * 300))
    assert finished.status == IO_FAILURE
    assert finished.output.splitlines()[-1].endswith("cannot be written (File name too long); choose a shorter one.")


def test_no_checkpoint_is_written_to_a_folder_that_is_gone(tmp_path):
    with FolderLock() as lock:
        lock.acquire(tmp_path / "run", "")
        hook = OwnFolderHook(1.0, lock)
        hook.before_save_checkpoint(None, {})
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(Exception, match="was deleted or moved"):
            hook.before_save_checkpoint(None, {})
