"""Fixtures that all tests need: no network, seeds, small models, and running programs."""

import logging
import os
import signal
import subprocess
import sys
from urllib.error import URLError

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU if tests ask for them

import mambavision
from checkout import ROOT
from small_models import SMALL

# Background jobs of scripts ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test reaches for the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def refuse(*args, **kwargs):
        raise URLError("offline")

    monkeypatch.setattr("timm.models._hub.download_url_to_file", refuse)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _untouched_logger():
    """Programs direct this package's messages for their whole process."""
    yield
    own = logging.getLogger("mambavision")
    own.handlers.clear()
    own.setLevel(logging.NOTSET)
    own.propagate = True


@pytest.fixture(scope="module", autouse=True)
def _no_default_scope():
    """The OpenMMLab library that a program makes the default stays it for the process: each file begins without one."""
    if "mmengine" in sys.modules:
        from mmengine.registry import DefaultScope

        DefaultScope._instance_dict.clear()


@pytest.fixture(params=SMALL)
def small_model(request):
    """A small model of each architecture, with random weights, in evaluation mode."""
    return mambavision.create_model(request.param, **SMALL[request.param]).eval()


@pytest.fixture
def run_program(tmp_path):
    """Run a Python program below the repository in a folder of its own, and return the finished process."""

    def run(*command, cwd=tmp_path, check=True, **environment):
        result = subprocess.run(
            [sys.executable, str(ROOT / command[0]), *map(str, command[1:])],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
        )
        if check and result.returncode:
            raise AssertionError(f"status {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    return run
