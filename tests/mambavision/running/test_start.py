"""Several processes on one machine: start.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import ROOT

PROGRAM = Path(__file__).parent / "programs" / "report_process.py"


@pytest.fixture
def start():
    def begin(count, *words, **environment):
        command = [sys.executable, str(ROOT / "mambavision/running/start.py"), str(count), str(PROGRAM), *words]
        environment = {"PATH": os.environ["PATH"]} | environment
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return begin


def test_processes_are_told_who_they_are(start):
    output, errors = start(2, "a b", "c", MASTER_ADDR="elsewhere", PORT="1").communicate(timeout=60)
    first, second = sorted(line.split() for line in output.splitlines())
    port = first.pop(5)
    assert second.pop(5) == port
    assert 0 < int(port) < 2**16
    assert first == ["0", "0", "2", "2", "127.0.0.1", "1", "a", "b", "c"]
    assert second == ["1", "1", "2", "2", "127.0.0.1", "1", "a", "b", "c"]
    assert errors == ""
    second_machine = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "OMP_NUM_THREADS": "4"}
    output, _ = start(2, "x", **second_machine).communicate(timeout=60)
    assert sorted(output.splitlines()) == ["2 0 4 2 10.0.0.1 29500 4 x", "3 1 4 2 10.0.0.1 29500 4 x"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_passed_on_once(start, number):
    program = start(2, "wait")
    assert program.stdout.readline()
    assert program.stdout.readline()
    program.send_signal(number)
    program.communicate(timeout=60)
    assert program.returncode == number


def test_status_is_that_of_the_first_to_fail(start):
    program = start(3, "fail")
    program.communicate(timeout=60)
    assert program.returncode == 75


def test_killed_processes_are_named(start):
    program = start(1, "die")
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 128 + signal.SIGKILL
    assert errors == "error: process 0 of this machine was killed by SIGKILL\n"


@pytest.mark.parametrize(
    ("machines", "complaint"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR, the address of the first machine"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 is not one of NNODES=1 machines, counted from 0"),
    ],
)
def test_machines_that_do_not_fit_are_refused(start, machines, complaint):
    program = start(1, "x", **machines)
    _, errors = program.communicate(timeout=60)
    assert (program.returncode, errors) == (2, f"error: {complaint}\n")
