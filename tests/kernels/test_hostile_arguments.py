"""Operators called directly, as exported programs call them: no argument makes them read out of bounds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vision_kernels  # noqa: F401  (registers the operators)

OPERATORS = sorted(
    name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("vision_kernels::")
)


def test_operators_are_found():
    assert {"selective_scan", "cross_merge", "mamba_mixer", "ss2d_backward"} <= set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_arguments_that_do_not_fit_are_refused(operator):
    program = Path(__file__).with_name("hostile_arguments.py")
    environment = {name: value for name, value in os.environ.items() if name != "VISION_KERNELS_BACKEND"}
    finished = subprocess.run([sys.executable, str(program), operator], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, f"{finished.stdout[-300:]}\n{finished.stderr[-2000:]}"
    problems = [line for line in finished.stdout.splitlines() if line.startswith("PROBLEM")]
    assert not problems, "\n".join(problems)
    assert int(finished.stdout.split()[-2]) > 20
