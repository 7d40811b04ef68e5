"""The scripts of all tasks as jobs of a Slurm that is started here: make test-slurm.

Its nodes have declared GPUs only, so that everything runs on the CPU.
"""

import json
import re
import socket
import subprocess
import sys
import time

import pytest
import torch
from cluster import Cluster

from checkout import ROOT
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import BAD_DATA, PREEMPTED
from mambavision.running.record import RECORD
from small_runs import SETTING, identical, weights

_SECONDS = 300  # for a job to come to something, on a busy machine


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def job(slurm, tmp_path):
    """Submit one of the scripts; what is still there at the end of a test is cancelled."""
    jobs = []

    def submit(script, *words, **environment):
        jobs.append(Job(slurm, tmp_path, script, words, environment))
        return jobs[-1]

    yield submit
    for each in jobs:
        slurm.ask("scancel", each.number, check=False)


class Job:
    def __init__(self, slurm, folder, script, words, environment):
        self.slurm = slurm
        variables = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "SBATCH_OPTIONS": f"--output={folder}/%j.log"}
        if not _resolves("n1"):
            variables["MASTER_ADDR"] = "127.0.0.1"
        result = subprocess.run(
            ["bash", str(ROOT / script), *map(str, words)],
            env=slurm.environment | variables | environment,
            capture_output=True,
            text=True,
        )
        found = re.fullmatch(r"Submitted batch job (\d+)\n", result.stdout)
        assert found, result.stderr
        self.number = found[1]
        self.log = folder / f"{self.number}.log"

    def signal(self, name):
        self.slurm.ask("scancel", f"--signal={name}", self.number)

    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def until(self, condition, what):
        """Wait until a condition of what Slurm knows of this job holds; return that."""
        until = time.monotonic() + _SECONDS
        while not condition(known := self.slurm.job(self.number)):
            assert time.monotonic() < until, f"{what} in vain; {known}\n{self.output()}"
            time.sleep(0.2)
        return known

    def until_it_says(self, text):
        self.until(lambda known: text in self.output() or _is_over(known), f"waited for {text!r}")
        assert text in self.output(), self.output()

    def until_it_ends(self):
        return self.until(_is_over, "waited for the end")


def _is_over(known):
    return known["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")


def _resolves(host):
    try:
        socket.gethostbyname(host)
    except OSError:
        return False
    return True


def assert_went_on(job):
    """After it was queued again once."""
    known = job.until_it_ends()
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == ("COMPLETED", "0:0", "1"), job.output()
    assert job.output().count(f"job {job.number} is queued again") == 1


@pytest.fixture
def trained(digits, tmp_path):
    """Words for a training of classification in a folder of its own, and the folder."""

    def give(name, *words):
        places = ["--data-dir", digits, "--output", tmp_path / name, "--experiment", "x"]
        return [*SETTING, "--workers", "1", "--model-ema", *places, *words], tmp_path / name / "exp" / "x"

    return give


def test_classification_over_two_nodes(job, trained):
    settings = {"NODES": "2", "PROCESSES": "1"}  # of eight GPUs
    words, folder = trained("whole", "--epochs", "6")
    whole = job("classification/train.sh", *words, **settings)
    words, preempted_folder = trained("preempted", "--epochs", "6")
    preempted = job("classification/train.sh", *words, **settings)
    preempted.until_it_says("epoch 1 ")
    preempted.signal("USR1")
    assert whole.until_it_ends()["JobState"] == "COMPLETED", whole.output()
    assert "cpu x 2" in whole.output()
    assert whole.slurm.job(whole.number)["NodeList"] == "n[1-2]"
    assert_went_on(preempted)
    assert "1: " not in "".join(re.findall("^1: .*epoch.*", preempted.output()))
    for key in ("state_dict", "state_dict_ema"):
        assert identical(weights(preempted_folder, key=key), weights(folder, key=key))


TASKS = {
    "object_detection": ("small_detector.py", ["train_cfg.max_epochs=4"], "Epoch(train) [2]"),
    "semantic_segmentation": (
        "small_segmenter.py",
        ["train_cfg.max_iters=24", "train_cfg.val_interval=20", "default_hooks.checkpoint.interval=12"],
        "Iter(train) [ 5/24]",
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_openmmlab(task, job, scenes, tmp_path):
    config, length, begun = TASKS[task]
    settings = {"GPUS": "2", **scenes}

    def train(name):
        words = [ROOT / "tests/openmmlab" / config, "--work-dir", tmp_path / name, "--cfg-options", *length]
        return job(f"{task}/tools/train.sh", *words, **settings)

    whole, preempted = train("whole"), train("preempted")
    preempted.until_it_says(begun)
    preempted.signal("TERM")
    assert whole.until_it_ends()["JobState"] == "COMPLETED", whole.output()
    assert_went_on(preempted)
    ends = [(tmp_path / name / "last_checkpoint").read_text().rpartition("/")[2] for name in ("whole", "preempted")]
    assert ends[0] == ends[1]
    left, right = (read_checkpoint(tmp_path / name / ends[0])["state_dict"] for name in ("whole", "preempted"))
    assert identical(left, right)
    checkpoint = tmp_path / "whole" / ends[0]
    test = job(f"{task}/tools/test.sh", ROOT / "tests/openmmlab" / config, checkpoint, **settings)
    assert test.until_it_ends()["JobState"] == "COMPLETED", test.output()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """The variables that name pictures of digits in the formats of detection and segmentation."""
    from scenes import Options, write_scenes

    root = tmp_path_factory.mktemp("scenes")
    for name in ("ade20k", "coco"):
        write_scenes(root / name, name, Options(train=8, val=3, side=64, digit_sides=(28, 36), most=2))
    return {"ADE20K_ROOT": str(root / "ade20k"), "SCENES_ROOT": str(root / "coco")}


def test_jobs_are_warned_before_their_time_limit(job, trained):
    """And not queued again more often than they may be; the same command, as a new job, goes on."""
    words, folder = trained("limited", "--epochs", "4000")
    limited = job("classification/train.sh", *words, GPUS="2", TIME="1", WARN="20", MAX_REQUEUES="0")
    known = limited.until_it_ends()
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == ("FAILED", f"{PREEMPTED}:0", "0")
    assert f"job {limited.number} was queued again 0 times, and MAX_REQUEUES is 0: not again" in limited.output()
    assert json.loads((folder / RECORD).read_text())["preempted"]
    again = job("classification/train.sh", *words, GPUS="2")
    again.until_it_says("resuming")
    again.until_it_says("epoch ")


def test_cancelled_jobs_stay_cancelled(job, trained):
    words, folder = trained("cancelled", "--epochs", "4000")
    cancelled = job("classification/train.sh", *words, GPUS="0")
    cancelled.until_it_says("epoch 1 ")
    cancelled.slurm.ask("scancel", cancelled.number)
    known = cancelled.until_it_ends()
    assert (known["JobState"], known["Restarts"]) == ("CANCELLED", "0")
    assert json.loads((folder / RECORD).read_text())["preempted"]


def test_one_failing_process_ends_the_job(job, trained, digits, tmp_path):
    """With what it has to say last, but for Slurm's own lines."""
    broken = tmp_path / "data"
    for path in digits.rglob("*.png"):
        copy = broken / path.relative_to(digits)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    next(broken.glob("train/*/07.png")).write_bytes(b"no image")
    words, _ = trained("failed", "--epochs", "4000", "--data-dir", broken)
    failed = job("classification/train.sh", *words, GPUS="0", PROCESSES="3")
    started = time.monotonic()
    known = failed.until_it_ends()
    assert (known["JobState"], known["ExitCode"]) == ("FAILED", f"{BAD_DATA}:0")
    assert time.monotonic() - started < 60
    own = [line for line in failed.output().splitlines() if re.match(r"\d: (?!slurmstepd)", line)]
    assert re.match(r"\d: error: .*07\.png: cannot be decoded", own[-1])
    assert failed.output().count("error: /") == 1
    assert "Traceback" not in failed.output()


def test_an_allocation_is_used(slurm, digits, tmp_path):
    """And three processes score as one does."""
    from mambavision import create_model, save_checkpoint
    from small_models import SMALL

    model = create_model("mamba_vision_T", **SMALL["mamba_vision_T"] | {"num_classes": 3})
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    kwargs = SETTING[SETTING.index("--model-kwargs") : SETTING.index("--input-size")]
    words = ["--model", "mamba_vision_T", *kwargs, "num_classes=3", "--checkpoint", tmp_path / "model.pth"]
    words += ["--input-size", "3", "32", "32", "--data-dir", digits, "--batch-size", "4", "--device", "cpu"]
    command = ["bash", str(ROOT / "classification/test.sh"), *map(str, words)]
    scores = {}
    for processes, before in {1: [], 3: ["salloc", "--nodes=1", "--ntasks=3", "--quiet"]}.items():
        variables = {"GPUS": "0", "PROCESSES": str(processes), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        if processes == 1:
            variables["LAUNCH"] = "local"
        result = subprocess.run(
            before + command, env=slurm.environment | variables, capture_output=True, text=True, timeout=_SECONDS
        )
        assert result.returncode == 0, result.stderr
        text = re.sub(r"^\d: ", "", result.stdout.split("--result\n")[1], flags=re.MULTILINE)
        scores[processes] = {key: float(json.loads(text)[key]) for key in ("top1", "top5", "loss")}
    assert scores[3] == pytest.approx(scores[1], abs=1e-6)
    assert torch.tensor(list(scores[1].values())).isfinite().all()
