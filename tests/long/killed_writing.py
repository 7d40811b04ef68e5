"""SIGKILL while checkpoints are written: many rounds of what test_crash.py and test_crashes.py do a few times."""

import os
import sys

import pytest

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(TESTS, "classification"), os.path.join(TESTS, "openmmlab")]

import test_crash as classification  # noqa: E402
import test_crashes as openmmlab  # noqa: E402
from test_crash import no_links  # noqa: E402, F401

POINTS, COPIES, TIMES = 30, 5, 20
TASKS = pytest.mark.parametrize("task", [classification, openmmlab], ids=lambda task: task.__name__)


@TASKS
@pytest.mark.parametrize("seed", range(POINTS))
def test_killed_at_a_point_of_writing(tmp_path, task, seed):
    task.kill_at_a_point(tmp_path, seed, POINTS)


@pytest.mark.parametrize("seed", range(COPIES))
def test_killed_while_copying(tmp_path, no_links, seed):  # noqa: F811
    classification.kill_at_a_point(tmp_path, seed, COPIES)


@TASKS
@pytest.mark.parametrize("seed", range(TIMES))
def test_killed_at_any_time(tmp_path, task, seed):
    task.kill_at_any_time(tmp_path, seed)
