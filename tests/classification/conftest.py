"""A small data set of real scans, and training on it."""

import functools
import io
import shutil
import traceback

import pytest
import torch

import mambavision
from data_sets import write_digits
from small_models import SMALL
from small_runs import SETTING, setting


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Real handwritten digits as an ImageNet-style folder: 3 classes, 20 training and 5 validation images each."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def copied(digits, tmp_path):
    """A copy of the digits that a test may spoil."""
    return shutil.copytree(digits, tmp_path / "digits")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint as train.py writes it, of a model that tells the digits' brightness at best."""
    torch.manual_seed(0)
    arguments = SMALL["mamba_vision_T"] | {"num_classes": 3}
    model = mambavision.create_model("mamba_vision_T", **arguments)
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth.tar"
    content = {
        "arch": "mamba_vision_T",
        "model_kwargs": arguments,
        "state_dict": model.state_dict(),
        "state_dict_ema": {key: value * 0 for key, value in model.state_dict().items()},
        "data_config": {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3},
        "exif_transpose": False,
        "classes": ["digit 0", "digit 1", "digit 2"],
    }
    mambavision.save_checkpoint(content, path)
    return path


@pytest.fixture
def training_options(digits, tmp_path, monkeypatch):
    """Parse the options of a small run, in a folder of its own."""
    from engine.options import TrainOptions

    monkeypatch.chdir(tmp_path)

    def parse(*words, data=digits, model="mamba_vision_T"):
        return TrainOptions.parse([*setting(model), "--data-dir", str(data), *map(str, words)])

    yield parse
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def train(training_options, tmp_path):
    """Train in this process; return the run's folder."""
    from matplotlib.figure import Figure

    import engine.train

    # Trainers must not be left to the garbage collector, in which each worker of a loader takes 5 s to end: what
    # matplotlib imports when it first draws keeps the frames on the stack, and so does what pytest.raises catches.
    Figure().savefig(io.BytesIO(), format="png")

    def start(*words, **others):
        try:
            engine.train.train(training_options(*words, **others))
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        folders = sorted(tmp_path.glob("output/train/exp/*"))
        return folders[-1] if folders else None

    return start


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """Train a small run with some options once; return its folder, which tests must not change."""
    import engine.train
    from engine.options import TrainOptions

    @functools.cache
    def folder(*words):
        output = tmp_path_factory.mktemp("trained")
        place = ["--data-dir", str(digits), "--output", str(output), "--experiment", "run"]
        torch.manual_seed(0)
        engine.train.train(TrainOptions.parse([*SETTING, *place, *words]))
        torch.use_deterministic_algorithms(False)
        return output / "exp" / "run"

    return folder


@pytest.fixture
def copy_of_run(trained, training_options, tmp_path):
    """Copy a run with some options to where `train` writes its runs; return its folder."""

    def copy(*words, name="run"):
        return shutil.copytree(trained(*words), tmp_path / "output/train/exp" / name)

    return copy


@pytest.fixture
def prepare(training_options):
    """Build the trainer of a small run."""
    from engine.train import Trainer
    from mambavision.running.group import Group
    from mambavision.running.signals import StopSignals

    return lambda *words, **others: Trainer(training_options(*words, **others), Group(), StopSignals())
