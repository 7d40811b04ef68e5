"""Programs of three processes of which some fail: what is said, in which order, and that all of them end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs" / "failing_processes.py"
SCENARIOS = (
    "option",
    "option of one",
    "one",
    "first",
    "last",
    "all",
    "data",
    "killed",
    "blocked",
    "interrupted",
    "none",
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Return the exit statuses of the processes of each scenario, and the folder with what they said."""
    folder = tmp_path_factory.mktemp("failures")
    command = [sys.executable, str(PROGRAM), str(folder), *SCENARIOS]
    result = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), folder


def said(folder, scenario):
    path = folder / scenario
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("scenario", ["one", "first", "last", "all", "blocked"])
def test_first_traceback_is_the_only_one(ended, scenario):
    """Also where the others wait in a collective for ever."""
    statuses, folder = ended
    lines = said(folder, scenario)
    assert statuses[scenario] == [1, 1, 1]
    assert lines[-1] == "ValueError: the cause"
    assert sum(line.startswith("Traceback") for line in lines) == 1


def test_torchrun_learns_of_it(ended):
    _, folder = ended
    content = json.loads((folder / "one 1.json").read_text())
    assert content["message"]["extraInfo"]["py_callstack"].endswith("ValueError: the cause")
    assert content["message"]["extraInfo"]["timestamp"].isdigit()
    assert not (folder / "one 0.json").exists()


def test_errors_of_the_user_are_said_once(ended):
    """The status is that of the process with the error."""
    statuses, folder = ended
    assert said(folder, "data") == ["error: a broken image"]
    assert statuses["data"] == [65, 65, 65]


def test_errors_before_the_processes_meet(ended):
    """The first process speaks at once; torchrun, srun and the scripts end the others then, but nothing did here."""
    statuses, folder = ended
    assert set(said(folder, "option")) == {"error: no such option"}
    assert statuses["option"] == [2, 2, 2]
    assert said(folder, "option of one") == ["error: no such option"]
    assert statuses["option of one"] == [0, 2, 0]


def test_lost_process_ends_the_others(ended):
    statuses, folder = ended
    assert statuses["killed"] == [1, -9, 1]
    assert sum(line.startswith("Traceback") for line in said(folder, "killed")) == 1


def test_interruption_is_said_once(ended):
    statuses, folder = ended
    assert said(folder, "interrupted") == ["interrupted"]
    assert statuses["interrupted"] == [143, 143, 143]


def test_processes_that_succeed_say_nothing(ended):
    statuses, folder = ended
    assert statuses["none"] == [0, 0, 0]
    assert said(folder, "none") == []
