"""Shared fixtures: small models, a small data set of real scans, running programs, and training."""

import csv
import importlib.util
import io
import logging
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU if tests ask for them

import mambavision
from mambavision.checkpoint import read_checkpoint

# Background jobs of scripts ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

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
    "vmamba_tiny_s1l8": {"dims": 16, "depths": (1, 1, 2, 1), "num_classes": 10},
    "segman_encoder_t": {
        "embed_dims": (8, 16, 24, 32),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
        "projection": 24,
        "layer_scale": 1e-2,
        "num_classes": 10,
    },
    "vanilla_vmamba_tiny": {"dims": 16, "depths": (1, 1, 2, 1), "ssm_d_state": 4, "num_classes": 10},
}


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


def load_program(path):
    """Import a program by its path below the repository: those of different tasks have the same names."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


# Training


def setting(name):
    """Return the options of a small run of a small model."""
    arguments = [f"{key}={value}" for key, value in SMALL[name].items() if key != "num_classes"]
    return ["--model", name, "--model-kwargs", *arguments, *_SETTING]


_SETTING = [
    "--input-size", "3", "32", "32", "--device", "cpu", "--batch-size", "10", "--workers", "0", "--epochs", "2",
    "--warmup-epochs", "1", "--cooldown-epochs", "0", "--lr", "1e-3", "--hflip", "0", "--deterministic",
]  # fmt: skip
SETTING = setting("mamba_vision_T")


@pytest.fixture
def training_options(digits, tmp_path, monkeypatch):
    """Parse the options of a small run, in a folder of its own."""
    from engine.options import train_options

    monkeypatch.chdir(tmp_path)

    def parse(*words, data=digits, model="mamba_vision_T"):
        return train_options([*setting(model), "--data-dir", str(data), *map(str, words)])

    yield parse
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def train(training_options, tmp_path):
    """Train in this process; return the run's folder."""
    from matplotlib.figure import Figure

    from engine import trainer

    # Trainers must not be left to the garbage collector, in which each worker of a loader takes 5 s to end: what
    # matplotlib imports when it first draws keeps the frames on the stack, and so does what pytest.raises catches.
    Figure().savefig(io.BytesIO(), format="png")

    def start(*words, **others):
        try:
            trainer.train(training_options(*words, **others))
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        folders = sorted(tmp_path.glob("output/train/exp/*"))
        return folders[-1] if folders else None

    return start


@pytest.fixture
def prepare(training_options):
    """Build the trainer of a small run."""
    from engine.train import Trainer
    from mambavision.running.process import Process
    from mambavision.running.signals import StopSignals

    cpu = torch.device("cpu")
    return lambda *words, **others: Trainer(training_options(*words, **others), Process(), cpu, StopSignals())


def weights(folder, name="last.pth.tar", key="state_dict"):
    return read_checkpoint(folder / name)[key]


def identical(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def summary(folder):
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Detection and segmentation


@pytest.fixture(scope="session")
def coco_scenes(tmp_path_factory):
    """Four pictures of digits to train on and two held out, in COCO's format."""
    from scenes import Options, write_scenes

    root = tmp_path_factory.mktemp("scenes") / "coco"
    write_scenes(root, "coco", Options(train=4, val=2, side=64, digit_sides=(28, 36), most=2))
    return root


@pytest.fixture
def detector_config(coco_scenes, monkeypatch):
    """The config of a small Mask R-CNN on `coco_scenes`."""
    monkeypatch.setenv("SCENES_ROOT", str(coco_scenes))
    return ROOT / "tests" / "openmmlab" / "small_detector.py"
