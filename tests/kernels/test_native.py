"""Memory of the C++ kernels: freed with its thread, and an error if there is too little. In separate processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vision_kernels import native
from vision_kernels.backends import BACKEND_VARIABLE

PROGRAM = Path(__file__).parent / "programs" / "kernel_memory.py"
AVAILABLE = [name for name in native.INSTRUCTION_SETS if native.why_unavailable(name) is None]
pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs the C++ kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def output(*arguments):
    environment = os.environ | {BACKEND_VARIABLE: AVAILABLE[0], "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, PROGRAM, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_memory_is_freed_with_its_thread():
    (grown,) = output("threads")
    assert int(grown) < 200 * 20_000  # each thread used more than ten times as much


def test_running_out_of_memory_is_an_error():
    lines = output("limits", *AVAILABLE)
    assert len(lines) == 9 * len(AVAILABLE)
    for line in lines:
        _, kernel, outcome = line.split(maxsplit=2)
        assert outcome == f"{kernel}: out of memory; compute fewer images at a time or smaller ones", line
