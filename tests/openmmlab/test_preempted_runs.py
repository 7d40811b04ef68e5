"""Detectors and segmenters in training that are asked to leave, and go on as if they had not been."""

import json
import re
from functools import cache

import pytest
import torch

from checkout import ROOT
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import BAD_DATA, IO_FAILURE, PREEMPTED
from mambavision.running.record import RECORD
from ranks import run_ranks

TASKS = {"semantic_segmentation": "small_preempted_segmenter.py", "object_detection": "small_preempted_detector.py"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven pictures to train on and three held out, in the formats of both tasks."""
    from scenes import Options, write_scenes

    options = Options(train=7, val=3, side=64, digit_sides=(28, 36), most=2)
    root = tmp_path_factory.mktemp("scenes")
    for name in ("ade20k", "coco"):
        write_scenes(root / name, name, options)
    return {"ADE20K_ROOT": str(root / "ade20k"), "SCENES_ROOT": str(root / "coco")}


@pytest.fixture(scope="module")
def train(data):
    def start(task, work_dir, *words, ranks=1, **environment):
        config = ROOT / "tests" / "openmmlab" / TASKS[task]
        program = ROOT / task / "tools" / "train.py"
        words = [config, "--work-dir", work_dir, *words]
        return run_ranks(program, words, f"{work_dir}.log", ranks, **data, **environment)

    return start


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """Give the folder of an uninterrupted run, which is the same for all tests."""

    @cache
    def give(task, ranks):
        work_dir = tmp_path_factory.mktemp("whole") / "run"
        for finished in train(task, work_dir, ranks=ranks):
            assert finished.status == 0, finished.output
        return work_dir

    return give


def logged(work_dir):
    """Return losses, learning rates and gradients' norms of all iterations, and scores, from all logs of a run."""
    found = []
    for log in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in map(json.loads, log.read_text().splitlines()):
            found.append({key: value for key, value in line.items() if key not in ("time", "data_time")})
    return found


def identical(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(identical(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(identical, left, right))
    return left == right


def assert_same_run(ours, theirs):
    assert logged(ours) == logged(theirs)
    names = {path.name for path in theirs.glob("*.pth")}
    assert {path.name for path in ours.glob("*.pth")} == names
    for name in names:
        left, right = (read_checkpoint(folder / name) for folder in (ours, theirs))
        for key in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
            assert identical(left.get(key), right.get(key)), (name, key)


CASES = {  # when to ask the run to leave, again and again, and after which iteration it does
    "segmentation": ("semantic_segmentation", 1, {"train 5 SIGTERM 0": 6}),
    "segmentation, two processes": ("semantic_segmentation", 2, {"val 1 SIGTERM 1": 4, "train 7 SIGUSR1 0": 8}),
    "detection": ("object_detection", 1, {"train 9 SIGUSR1 0": 10}),
    "detection, two processes": ("object_detection", 2, {"train 2 SIGTERM 1": 2, "val 1 SIGTERM 0": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_command_goes_on_exactly(case, train, uninterrupted, tmp_path):
    """With accumulated gradients, averaged weights, and another number of workers in the end."""
    task, ranks, asked = CASES[case]
    work_dir = tmp_path / "run"
    for ask, iteration in asked.items():
        left = train(task, work_dir, ranks=ranks, DISTURB=ask)
        assert [finished.status for finished in left] == [PREEMPTED] * ranks, left[0].output
        assert "Traceback" not in left[0].output
        last = left[0].output.splitlines()[-1]
        assert last == f"interrupted; the same command resumes after iteration {iteration}"
        assert {RECORD, "recovery.pth"} <= {path.name for path in work_dir.iterdir()}
    gone_on = train(task, work_dir, "--cfg-options", "train_dataloader.num_workers=1", ranks=ranks)
    assert [finished.status for finished in gone_on] == [0] * ranks, gone_on[0].output
    assert "this run was preempted and is resumed; to start a new one, give --resume never" in gone_on[0].output
    assert not {RECORD, "recovery.pth"} & {path.name for path in work_dir.iterdir()}
    assert_same_run(work_dir, uninterrupted(task, ranks))


@pytest.mark.parametrize("task", TASKS)
def test_scores_do_not_depend_on_the_number_of_processes(task, data, uninterrupted, tmp_path):
    """Three pictures in batches of two, for one process, two and three; a detector of detections to score."""
    config, checkpoint = ROOT / "tests" / "openmmlab" / TASKS[task], next(uninterrupted(task, 1).glob("[ei]*_*.pth"))
    program = ROOT / task / "tools" / "test.py"
    found = {}
    for ranks in (1, 2, 3):
        words = [config, checkpoint, "--work-dir", tmp_path / str(ranks), "--cfg-options"]
        words += ["test_dataloader.batch_size=2", "test_dataloader.num_workers=0"]
        finished = run_ranks(program, words, tmp_path / f"{ranks}.log", ranks, NEARLY_RIGHT="1", **data)
        assert [each.status for each in finished] == [0] * ranks, finished[0].output
        (scores,) = (tmp_path / str(ranks)).glob("*/*.json")
        found[ranks] = {key: value for key, value in json.loads(scores.read_text()).items() if "time" not in key}
    assert any(0 < score < 1 for score in found[1].values()) or found[1]["mIoU"] > 0
    assert found[2] == pytest.approx(found[1], abs=1e-6)
    assert found[3] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_all_processes_stop_before_a_step_that_one_cannot_take(task, train, tmp_path):
    stopped = train(task, tmp_path / "run", ranks=2, DISTURB="train 3 nan 1")
    assert [finished.status for finished in stopped] == [BAD_DATA] * 2, stopped[0].output
    lines = [line for finished in stopped for line in finished.output.splitlines()]
    assert lines.count("same weights: True") == 2
    (sentence,) = (line for line in lines if line.startswith("error: "))  # one process speaks for all
    assert sentence.startswith("error: the loss is not finite; stopped before the optimizer's step. Samples:")
    assert re.search(r"Samples: process 1: \S+\.jpg(, \S+\.jpg)*\. This was iteration 4, and", sentence)
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "run" / "recovery.pth").exists()


@pytest.mark.parametrize("task", TASKS)
def test_full_disk(task, train, tmp_path):
    work_dir = tmp_path / "run"
    (full,) = train(task, work_dir, DISTURB="train 8 full 0")
    assert full.status == IO_FAILURE, full.output
    (checkpoint,) = work_dir.glob("[ei]*_*.pth")
    assert re.search(rf"{work_dir}/\w+\.pth: cannot be written .* [\d,]+ bytes are free", full.output.splitlines()[-1])
    assert "Traceback" not in full.output
    assert not [*work_dir.glob(".*")]
    assert read_checkpoint(checkpoint)["meta"]["iter"] in (4, 7)
    (work_dir / f".{checkpoint.name}.123.tmp").write_bytes(b"half")  # as a run that was killed leaves it
    (gone_on,) = train(task, work_dir, "--resume")
    assert gone_on.status == 0, gone_on.output
    assert not [*work_dir.glob(".*")]
