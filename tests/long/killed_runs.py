"""kill -9 at random moments of whole trainings of all tasks: started again by the same command, they end the same."""

import os
import random
import subprocess
import sys
import time

import pytest

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TESTS, os.path.join(TESTS, "openmmlab")]

from test_preempted_runs import TASKS, identical  # noqa: E402

from checkout import ROOT  # noqa: E402
from engine import run_folder  # noqa: E402
from mambavision.checkpoint import read_checkpoint  # noqa: E402
from mambavision.openmmlab.training import resume  # noqa: E402
from mambavision.running.newest import newest_valid  # noqa: E402
from ranks import run_ranks  # noqa: E402
from small_runs import SETTING, summary, weights  # noqa: E402
from small_runs import identical as same_weights  # noqa: E402

SEEDS = range(4)
KILLS = 4  # of a run


# Classification


@pytest.fixture(scope="module")
def classify(digits):
    def start(folder, *words):
        words = [*SETTING, "--data-dir", digits, "--epochs", "4", "--workers", "1", "--recovery-interval", "2", *words]
        words += ["--model-ema", "--model-ema-decay", "0.9", "--output", folder, "--experiment", "one"]
        command = [sys.executable, ROOT / "classification" / "train.py", *words, "--resume", "auto"]
        log = (folder.parent / f"{folder.name}.log").open("a")
        return subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )

    return start


def rows(folder):
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in summary(folder)]


@pytest.fixture(scope="module")
def undisturbed(classify, tmp_path_factory):
    folder, started = tmp_path_factory.mktemp("whole") / "output", time.monotonic()
    assert classify(folder).wait() == 0
    (found,) = folder.glob("*/one")
    return found, time.monotonic() - started


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_classifiers_end_like_undisturbed_ones(classify, undisturbed, tmp_path, seed):
    whole, duration = undisturbed
    moments, done = random.Random(seed), -1
    for _ in range(KILLS):
        process = classify(tmp_path / "output")
        time.sleep(moments.uniform(duration / 3, duration))
        process.kill()
        process.wait()
        for folder in tmp_path.glob("output/*/one"):
            if (found := newest_valid(run_folder.checkpoints_in(folder))) is not None:
                assert found[1]["epoch"] >= done  # nothing that was there is lost
                done = found[1]["epoch"]
                assert len(found[1]["summary"]) == done + (found[1]["next_batch"] is None)
    assert classify(tmp_path / "output").wait() == 0, (tmp_path / "output.log").read_text()
    (folder,) = tmp_path.glob("output/*/one")
    for key in ("state_dict", "state_dict_ema"):
        assert same_weights(weights(folder, key=key), weights(whole, key=key))
    assert rows(folder) == rows(whole)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        path.name for path in whole.iterdir() if path.is_file()
    }


# Detection and segmentation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from scenes import Options, write_scenes

    root = tmp_path_factory.mktemp("scenes")
    for name in ("ade20k", "coco"):
        write_scenes(root / name, name, Options(train=7, val=3, side=64, digit_sides=(28, 36), most=2))
    return {"ADE20K_ROOT": str(root / "ade20k"), "SCENES_ROOT": str(root / "coco")}


@pytest.fixture(scope="module")
def train(data):
    def start(task, work_dir, **others):
        words = [ROOT / "tests" / "openmmlab" / TASKS[task], "--work-dir", work_dir, "--resume"]
        # An epoch of the detector's seven batches ends between two that share a step, where checkpoints are not exact.
        words += ["--cfg-options", "optim_wrapper.accumulative_counts=1"]
        (finished,) = run_ranks(ROOT / task / "tools" / "train.py", words, f"{work_dir}.log", **others, **data)
        return finished

    return start


@pytest.fixture(scope="module", params=TASKS)
def whole(request, train, tmp_path_factory):
    """A task, its undisturbed run, and how long that took."""
    work_dir, started = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    finished = train(request.param, work_dir)
    assert finished.status == 0, finished.output
    return request.param, work_dir, time.monotonic() - started


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_runs_of_openmmlab_end_like_undisturbed_ones(whole, train, tmp_path, seed):
    task, theirs, duration = whole
    work_dir, moments, done = tmp_path / "run", random.Random(seed), -1
    for _ in range(KILLS):
        train(task, work_dir, seconds=moments.uniform(duration / 4, duration))
        found = newest_valid(resume._checkpoints(work_dir), resume._position)
        if found is not None:
            assert found[1]["meta"]["iter"] >= done
            done = found[1]["meta"]["iter"]
    finished = train(task, work_dir)
    assert finished.status == 0, finished.output
    names = {path.name for path in theirs.glob("*.pth")}
    assert {path.name for path in work_dir.glob("*.pth")} == names
    assert not [path for path in work_dir.iterdir() if path.name.endswith((".tmp", ".lock"))]
    for name in names:
        left, right = (read_checkpoint(folder / name) for folder in (work_dir, theirs))
        for key in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
            assert identical(left.get(key), right.get(key)), (name, key)
