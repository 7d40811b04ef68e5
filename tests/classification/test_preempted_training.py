"""train.py: SIGTERM and SIGUSR1, after which the same command ends as if there had been none."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import ROOT
from engine import learner, run_folder
from engine.train import Trainer
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import PREEMPTED, Preempted, UserError
from mambavision.running.process import STOP_SIGNALS
from mambavision.running.record import RECORD, begin, should_resume
from small_runs import SETTING, identical, summary, weights

FULL = ["--epochs", "3", "--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "4", "--mesa", "0.5",
        "--mesa-start-ratio", "0.1", "--drop-path", "0.3", "--log-interval", "1"]  # fmt: skip
STEPS = 2  # in an epoch of six batches


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """Keep the signal handlers of the tests' own process, and Slurm away."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ask(monkeypatch):
    """Send this process a signal when a method is called for the n-th time (from 0)."""

    def install(owner, method, at, number=signal.SIGTERM):
        original, calls = getattr(owner, method), []

        def and_ask(self, *words):
            calls.append(None)
            if len(calls) == at + 1:
                os.kill(os.getpid(), number)
            return original(self, *words)

        monkeypatch.setattr(owner, method, and_ask)

    return install


def figures(folder):
    """Return what the summary and the log say of every epoch and batch, but for the speed."""
    rows = [{key: value for key, value in row.items() if "per_second" not in key} for row in summary(folder)]
    return rows, re.findall(r"epoch \d+ \[\d+/\d+\] loss \S+  lr \S+", (folder / "train.log").read_text())


def assert_same(folder, other):
    """Weights, their average, and every loss on the way are the same to the last bit."""
    for key in ("state_dict", "state_dict_ema"):
        assert identical(weights(folder, key=key), weights(other, key=key))
    (rows, lines), (expected_rows, expected_lines) = figures(folder), figures(other)
    assert rows == expected_rows
    assert lines == expected_lines
    assert len(lines) >= 3 * 5


# Method, its call that the signal comes with, and the (epoch, batch) that the run must leave before.
MOMENTS = {
    "within the first epoch": (learner.Learner, "step", 0, (0, 6)),
    "within a later epoch": (learner.Learner, "step", STEPS, (1, 6)),
    "in the last step of an epoch": (Trainer, "_finish_step", STEPS - 1, (0, 6)),
    "in a validation": (Trainer, "_after_validation_batch", 5, (1, 6)),
    "in the last validation": (Trainer, "_after_validation_batch", 11, (2, 6)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_asked_run_ends_like_an_undisturbed_one(train, trained, ask, capsys, moment):
    undisturbed = trained(*FULL)
    owner, method, at, place = MOMENTS[moment]
    number = STOP_SIGNALS[len(moment) % 2]
    ask(owner, method, at, number)
    with pytest.raises(Preempted) as left:
        train(*FULL, "--experiment", "asked")
    assert left.value.exit_status == PREEMPTED
    assert left.value.advice == f" in epoch {place[0]}; the same command resumes the run"
    asked = Path("output/train/exp/asked")
    recovery = read_checkpoint(asked / run_folder.RECOVERY)
    assert (recovery["epoch"], recovery["next_batch"]) == place
    (asked / ".last.pth.tar.1234.tmp").write_text("of a process that was killed")
    capsys.readouterr()
    train(*FULL, "--experiment", "asked")
    assert (
        f"asked/{run_folder.RECOVERY}: its run was preempted (--resume never starts a new run)"
        in capsys.readouterr().out
    )
    assert_same(asked, undisturbed)
    assert {path.name for path in asked.iterdir()} == {path.name for path in undisturbed.iterdir()}


def preempt(train, *words):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.MonkeyPatch.context() as patch:
        step = learner.Learner.step
        patch.setattr(learner.Learner, "step", lambda self: (os.kill(os.getpid(), signal.SIGTERM), step(self))[1])
        with pytest.raises(Preempted) as left:
            train(*words)
    return left.value


def folders():
    return sorted(path.name for path in Path("output/train/exp").iterdir())


def test_run_goes_on_by_its_own_command_only(train, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("time.strftime", lambda pattern: f"{next(now):03d}")
    preempt(train, "--epochs", "1")
    (first,) = folders()
    train("--epochs", "1", "--lr", "2e-3")
    assert len(folders()) == 2
    train("--epochs", "1")
    assert len(folders()) == 2
    assert len(summary(Path("output/train/exp", first))) == 1
    train("--epochs", "1")  # the first has come to its end
    assert len(folders()) == 3


def test_runs_can_start_anew(train, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("time.strftime", lambda pattern: f"{next(now):03d}")
    preempt(train, "--epochs", "1")
    train("--epochs", "1", "--resume", "never")
    train("--epochs", "1")  # for good
    assert len(folders()) == 3
    preempt(train, "--epochs", "1", "--experiment", "named")
    with pytest.raises(UserError, match="already contains a run"):
        train("--epochs", "1", "--experiment", "named", "--resume", "never")


def test_jobs_that_slurm_restarts_go_on(train, monkeypatch):
    """After the failure of a machine, say: nothing had the time to leave a mark."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    words = ["--epochs", "1", "--experiment", "named", "--resume", "never"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mambavision.running.record.mark_preempted", lambda folder: None)
        preempt(train, *words)
    with pytest.raises(UserError, match="already contains a run"):
        train(*words)
    begin(Path("output/train/exp/named"), "never", is_new=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert len(summary(train(*words))) == 1


def test_jobs_that_slurm_restarts_leave_other_runs_alone(train, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("time.strftime", lambda pattern: f"{next(now):03d}")
    train("--epochs", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train("--epochs", "1")
    assert len(folders()) == 2


def test_files_to_resume_are_those_of_the_first_start(train, copy_of_run, ask):
    first = copy_of_run("--epochs", "1", name="first")
    words = ["--epochs", "3", "--experiment", "first", "--resume", first / run_folder.LAST, "--start-epoch", "1"]
    ask(Trainer, "_after_validation_batch", 3)
    with pytest.raises(Preempted):
        train(*words)
    assert read_checkpoint(first / run_folder.RECOVERY)["epoch"] == 2
    train(*words)
    assert [row["epoch"] for row in summary(first)] == ["0", "1", "2"]
    assert not (first / run_folder.RECOVERY).exists()


def test_runs_without_checkpoints_leave_too(train):
    left = preempt(train, "--no-saver")
    assert left.exit_status == PREEMPTED
    assert left.advice == " in epoch 0; --no-saver: nothing was saved, and the run would start over"
    (folder,) = Path("output/train/exp").iterdir()
    assert should_resume(folder, "") is None


# The program itself


SLOW = ["--epochs", "6", "--log-interval", "1", "--batch-size", "6", "--tag", "program", "--experiment"]
RUN = ["--model-ema", "--grad-accum-steps", "2", "--drop-path", "0.3", "--workers", "2", *SLOW]


@pytest.fixture
def start(digits, tmp_path):
    """Start the program alone, or as two processes."""

    def launch(experiment, processes=1, **environment):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        words = [str(ROOT / "classification/train.py"), *SETTING, *RUN, experiment, "--data-dir", str(digits)]
        return subprocess.Popen(
            [sys.executable, "-u", *(launcher if processes > 1 else []), *words],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return launch


def wait_for(program, text):
    while text not in (line := program.stdout.readline()):
        assert line, f"the program ended before it said {text!r}"


def test_program_leaves_and_goes_on(start, tmp_path):
    """All its processes get the signal, those of the loaders too."""
    undisturbed, asked = start("undisturbed"), start("asked")
    wait_for(asked, "epoch 1 [")
    os.killpg(asked.pid, signal.SIGTERM)
    said = asked.communicate(timeout=100)[0]
    assert asked.returncode == PREEMPTED
    assert said.splitlines()[-1].endswith("; the same command resumes the run")
    assert "Traceback" not in said
    again = start("asked")
    assert "its run was preempted" in again.communicate(timeout=100)[0]
    undisturbed.communicate(timeout=100)
    assert (again.returncode, undisturbed.returncode) == (0, 0)
    runs = tmp_path / "output/train/program"
    assert_same(runs / "asked", runs / "undisturbed")


def test_two_processes_leave_together_and_go_on(start, tmp_path):
    """First one of them is asked, then torchrun, which passes the signal on. Slurm is asked for the job once a time."""
    requests, scontrol = tmp_path / "requests", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(
        f'#!/bin/sh\nif [ "$1" = show ]; then echo JobState=RUNNING; else echo "$@" >> {requests}; fi\n'
    )
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    asked = start("asked", 2, **job)
    wait_for(asked, "epoch 1 [")
    children = Path(f"/proc/{asked.pid}/task/{asked.pid}/children").read_text().split()
    second = next(int(pid) for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(second, signal.SIGUSR1)
    said = asked.communicate(timeout=100)[0]
    assert "; the job has been requeued" in said
    assert said.count(f"exitcode  : {PREEMPTED} ") + said.count(f"exitcode: {PREEMPTED} ") >= 1, said
    assert requests.read_text() == "requeue 7\n"

    asked = start("asked", 2, SLURM_RESTART_COUNT="1", **job)
    wait_for(asked, "its run was preempted")
    wait_for(asked, "epoch 3 [")
    asked.send_signal(signal.SIGTERM)
    assert "; the job has been requeued" in asked.communicate(timeout=100)[0]
    assert requests.read_text() == "requeue 7\n" * 2

    programs = [start("asked", 2, SLURM_RESTART_COUNT="2", **job), start("undisturbed", 2)]
    said = [program.communicate(timeout=200)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], said
    runs = tmp_path / "output/train/program"
    assert_same(runs / "asked", runs / "undisturbed")
    assert not (runs / "asked" / RECORD).exists()
