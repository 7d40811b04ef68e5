"""Signals that ask a run to leave, and what Slurm is asked for then."""

import os
import signal

import pytest

from mambavision import preemption
from mambavision.errors import PREEMPTED
from mambavision.launch import Process


@pytest.fixture(autouse=True)
def handlers():
    """Keep the signal handlers of the tests' own process."""
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
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


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_first_signal_is_noted_and_a_later_one_acts(number, monkeypatch):
    acted = []
    now = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(preemption.time, "monotonic", lambda: next(now))
    for each in preemption.SIGNALS:
        signal.signal(each, lambda number, frame: acted.append(number))
    with preemption.StopSignals() as signals:
        assert not signals.received
        for _ in range(2):  # at once: an echo
            os.kill(os.getpid(), number)
            assert signals.received
            assert not acted
        os.kill(os.getpid(), number)
        assert acted == [number]
    os.kill(os.getpid(), number)
    assert acted == [number, number]


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with preemption.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not signals.received


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_first_process_has_the_job_queued_again_once(scontrol, rank):
    requests = scontrol()
    assert preemption.requeue(Process(rank, 0, 8, "slurm"), JOB) == (rank == 0)
    assert requests() == (["requeue 7"] if rank == 0 else [])


def test_without_slurm_nothing_is_queued(scontrol):
    requests = scontrol()
    assert not preemption.requeue(Process(), {})
    assert requests() == []


@pytest.mark.parametrize(("restarts", "limit", "queued"), [("2", "3", True), ("3", "3", False), ("", "0", False)])
def test_jobs_are_queued_again_a_limited_number_of_times(scontrol, restarts, limit, queued):
    requests = scontrol()
    environment = JOB | {"SLURM_RESTART_COUNT": restarts, "MAX_REQUEUES": limit}
    assert preemption.requeue(Process(), environment) == queued
    assert len(requests()) == queued


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED"])
def test_jobs_that_others_ended_are_left_alone(scontrol, state):
    requests = scontrol(state)
    assert not preemption.requeue(Process(), JOB)
    assert requests() == []


def test_refusal_is_told(scontrol, caplog):
    scontrol(status=1)
    assert not preemption.requeue(Process(), JOB)
    assert "does not queue job 7 again (no such job)" in caplog.text


def test_leaving_marks_the_run(scontrol, tmp_path, monkeypatch):
    requests = scontrol()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not preemption.goes_on(tmp_path, {})
    with pytest.raises(preemption.Preempted) as left:
        preemption.leave_preempted(Process(), tmp_path, "; by hand")
    assert (left.value.exit_status, left.value.advice) == (PREEMPTED, "; the job is queued again")
    assert requests() == ["requeue 7"]
    assert preemption.goes_on(tmp_path, {})
    preemption.unmark(tmp_path)
    assert not preemption.goes_on(tmp_path, {})
    assert preemption.goes_on(tmp_path, {"SLURM_RESTART_COUNT": "1"})
