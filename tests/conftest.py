"""Shared fixtures: small models, a small data set of real scans, and running programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mambavision

ROOT = Path(__file__).resolve().parent.parent

# Constructor arguments that make a model of each architecture small, for tests that train or compile.
SMALL = {
    "mamba_vision_T": {
        "dim": 16,
        "in_dim": 8,
        "depths": (1, 1, 2, 2),
        "num_heads": (1, 1, 2, 4),
        "window_size": (8, 8, 4, 2),
        "num_classes": 10,
    },
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test reaches for the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=SMALL)
def small_model(request):
    """A small model of each architecture, with random weights, in evaluation mode."""
    return mambavision.create_model(request.param, **SMALL[request.param]).eval()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Real handwritten digits as an ImageNet-style folder: 3 classes, 20 training and 5 validation images each."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("data") / "digits"
    scans = load_digits(n_class=3)
    for digit in range(3):
        for number, pixels in enumerate(scans.images[scans.target == digit][:25]):
            folder = root / ("train" if number < 20 else "val") / f"digit {digit}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * (255 / 16)).astype("uint8")).resize((32, 32)).save(folder / f"{number:02d}.png")
    return root


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
