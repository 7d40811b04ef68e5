"""Signals that ask a run to leave, and what Slurm is asked for then."""

import os
import signal

import pytest

from mambavision.errors import PREEMPTED, OutputError, Preempted, UserError
from mambavision.running import record, signals
from mambavision.running.group import Group
from mambavision.running.process import STOP_SIGNALS, Process
from mambavision.running.record import begin, finish, mark_preempted, should_resume
from mambavision.running.signals import StopSignals, end_preempted
from mambavision.running.slurm import requeue


@pytest.fixture(autouse=True)
def handlers():
    """Keep the signal handlers of the tests' own process."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A Slurm that takes notes; `state` is what it says of jobs. Returns the requests so far."""
    requests = tmp_path / "requests"

    def install(state="RUNNING", status=0):
        program = tmp_path / "bin" / "scontrol"
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\nif [ "$1" = show ]; then echo "JobId=7 JobState={state} Reason=None"; exit; fi\n'
            f'echo "$@" >> {requests}\nif [ {status} != 0 ]; then echo "no such job" >&2; fi\nexit {status}\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return lambda: requests.read_text().splitlines() if requests.exists() else []

    return install


JOB = {"SLURM_JOB_ID": "7"}


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_is_noted_and_a_later_one_acts(number, monkeypatch):
    acted = []
    now = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(now))
    for each in STOP_SIGNALS:
        signal.signal(each, lambda number, frame: acted.append(number))
    with StopSignals() as caught:
        assert not caught.received
        for _ in range(2):  # at once: an echo
            os.kill(os.getpid(), number)
            assert caught.received
            assert not acted
        os.kill(os.getpid(), number)
        assert acted == [number]
    os.kill(os.getpid(), number)
    assert acted == [number, number]


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with StopSignals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not caught.received


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_first_process_has_the_job_queued_again_once(scontrol, rank):
    requests = scontrol()
    assert requeue(Process(rank, 0, 8, "slurm"), JOB) == (rank == 0)
    assert requests() == (["requeue 7"] if rank == 0 else [])


def test_without_slurm_nothing_is_queued(scontrol):
    requests = scontrol()
    assert not requeue(Process(), {})
    assert requests() == []


@pytest.mark.parametrize(("restarts", "limit", "queued"), [("2", "3", True), ("3", "3", False), ("", "0", False)])
def test_jobs_are_queued_again_a_limited_number_of_times(scontrol, restarts, limit, queued):
    requests = scontrol()
    environment = JOB | {"SLURM_RESTART_COUNT": restarts, "MAX_REQUEUES": limit}
    assert requeue(Process(), environment) == queued
    assert len(requests()) == queued


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED"])
def test_jobs_that_others_ended_are_left_alone(scontrol, state):
    requests = scontrol(state)
    assert not requeue(Process(), JOB)
    assert requests() == []


def test_refusal_is_told(scontrol, caplog):
    scontrol(status=1)
    assert not requeue(Process(), JOB)
    assert "does not requeue job 7 (no such job)" in caplog.text


def test_leaving_marks_the_run(scontrol, tmp_path, monkeypatch):
    requests = scontrol()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    begin(tmp_path, "", is_new=True)
    assert should_resume(tmp_path, "") is None
    with pytest.raises(Preempted) as left:
        end_preempted(Group(), tmp_path, "; by hand")
    assert (left.value.exit_status, left.value.advice) == (PREEMPTED, "; the job has been requeued")
    assert requests() == ["requeue 7"]
    assert should_resume(tmp_path, "") is not None
    finish(tmp_path)
    assert should_resume(tmp_path, "") is None


@pytest.mark.parametrize(
    ("started", "command", "goes_on"),
    [
        ("", "", True),
        ("", "auto", False),  # which finds it by itself
        ("auto", "auto", True),
        ("old.pth", "old.pth", True),
        ("old.pth", "", True),
        ("old.pth", "other.pth", False),
        ("never", "never", False),
    ],
)
def test_preempted_runs_go_on_by_the_same_command(tmp_path, started, command, goes_on):
    begin(tmp_path, started, is_new=True)
    assert should_resume(tmp_path, command) is None
    mark_preempted(tmp_path)
    assert (should_resume(tmp_path, command) is not None) == goes_on
    began = should_resume(tmp_path, started if started != "never" else "")
    begin(tmp_path, command, is_new=False)  # it goes on, and may be killed
    assert should_resume(tmp_path, "") == began
    begin(tmp_path, command, is_new=True)
    assert should_resume(tmp_path, "") is None


@pytest.mark.parametrize("command", ["", "never", "other.pth"])
def test_restarted_jobs_go_on_with_their_own_run_only(tmp_path, command):
    restarted = JOB | {"SLURM_RESTART_COUNT": "1"}
    assert should_resume(tmp_path, command, restarted) is None
    begin(tmp_path, command, is_new=True, environment=JOB)
    assert should_resume(tmp_path, command, JOB) is None
    assert should_resume(tmp_path, command, restarted) is not None
    assert should_resume(tmp_path, command, restarted | {"SLURM_JOB_ID": "8"}) is None


def test_limit_must_be_a_number(monkeypatch):
    monkeypatch.setenv("MAX_REQUEUES", "often")
    with pytest.raises(UserError, match="MAX_REQUEUES=often"), StopSignals():
        pass


def test_full_disk_does_not_keep_the_job_from_being_queued_again(scontrol, tmp_path, monkeypatch, caplog):
    requests = scontrol()
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def refuse(folder):
        raise OutputError("disk full")

    monkeypatch.setattr(record, "mark_preempted", refuse)
    with pytest.raises(Preempted):
        end_preempted(Group(), tmp_path, "")
    assert requests() == ["requeue 7"]
    assert "disk full" in caplog.text
