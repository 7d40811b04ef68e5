"""Ctrl-C, and SIGTERM where no training can save its state."""

import os
import re
import signal
import subprocess
import sys

import pytest

from checkout import ROOT
from engine import report, run_folder
from mambavision.errors import Interruption
from small_runs import SETTING


def test_interrupted_training_says_how_to_go_on(digits, tmp_path):
    """The signal reaches the loaders' worker processes as well: a terminal signals them all."""
    words = [*SETTING, "--epochs", "500", "--workers", "2", "--log-interval", "1", "--data-dir", str(digits)]
    program = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "classification/train.py"), *words],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while "epoch 1 [3/6]" not in (line := program.stdout.readline()):
        assert line, program.stderr.read()
    os.killpg(program.pid, signal.SIGINT)
    try:
        _, errors = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 130
    last_line = errors.splitlines()[-1]
    assert re.fullmatch(
        r"interrupted in epoch (1|2); resume with --resume auto \(last complete epoch: (0|1)\)", last_line
    )
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "complete", "advice"),
    [
        ([], None, " in epoch 0; no checkpoint was written yet"),
        ([], 0, " in epoch 1; resume with --resume auto (last complete epoch: 0)"),
        (["--no-saver"], 0, " in epoch 1; no checkpoint was written yet"),
        (["--recovery-interval", "1"], None, " in epoch 0; resume with --resume auto (last complete epoch: none)"),
    ],
)
def test_advice_depends_on_what_was_saved(prepare, monkeypatch, words, complete, advice):
    small = prepare(*words)
    backward = small.learner.backward

    def stop(loss):
        if small.learner.updates == (3 if complete is None else 6 * complete + 9):
            raise Interruption(signal.SIGTERM)
        backward(loss)

    monkeypatch.setattr(small.learner, "backward", stop)
    with pytest.raises(Interruption) as interruption:
        small.fit()
    assert interruption.value.advice == advice


def test_interruption_while_the_report_is_closed_is_explained(prepare, monkeypatch):
    """As when a loader's worker notices SIGTERM before the program does."""
    small, close = prepare(), report.RunReport.close
    small.folder.mkdir(parents=True)
    (small.folder / run_folder.LAST).touch()

    def lose_a_worker(epoch, reporter):
        raise RuntimeError("DataLoader worker is killed by signal: Terminated.")

    def close_and_be_interrupted(reporter):
        close(reporter)
        raise Interruption(signal.SIGTERM)

    monkeypatch.setattr(small, "_run_epoch", lose_a_worker)
    monkeypatch.setattr(report.RunReport, "close", close_and_be_interrupted)
    with pytest.raises(Interruption) as interruption:
        small.fit()
    assert interruption.value.advice == " in epoch 0; resume with --resume auto (last complete epoch: none)"
