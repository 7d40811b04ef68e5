"""Options of small training runs, and what the runs leave behind."""

import csv
from types import SimpleNamespace

import torch

from mambavision.checkpoint import read_checkpoint
from small_models import SMALL


def setting(name):
    """Return the options of a small run of a small model."""
    arguments = [f"{key}={value}" for key, value in SMALL[name].items() if key != "num_classes"]
    return ["--model", name, "--model-kwargs", *arguments, *_SETTING]


_SETTING = [
    "--input-size", "3", "32", "32", "--device", "cpu", "--batch-size", "10", "--workers", "0", "--epochs", "2",
    "--warmup-epochs", "1", "--cooldown-epochs", "0", "--lr", "1e-3", "--hflip", "0", "--deterministic",
]  # fmt: skip
SETTING = setting("mamba_vision_T")


def flat(options):
    """Return the options of a program as attributes of one object."""
    return SimpleNamespace(**options.flat())


def weights(folder, name="last.pth.tar", key="state_dict"):
    return read_checkpoint(folder / name)[key]


def identical(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def summary(folder):
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(folder):
    """Return the summary without the speed, which differs between equal runs."""
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in summary(folder)]
