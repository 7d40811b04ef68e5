"""train.py: runs, and what they leave behind."""

import itertools
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import mambavision
from checkout import ROOT
from engine import run_folder
from engine.model import create_any
from engine.train import Trainer
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import CheckpointError, DataError, OutputError, UserError
from small_models import SMALL
from small_runs import SETTING, summary, weights

# A run


@pytest.mark.parametrize("name", ["mamba_vision_T", "segman_encoder_t", "vmamba_tiny_s1l8"])
def test_a_run_leaves_everything_behind(train, capsys, name):
    folder = train("--model-ema", model=name)
    rows = summary(folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"} < rows[0].keys()
    assert all(math.isfinite(float(row["train_loss"])) for row in rows)
    names = {path.name for path in folder.iterdir()}
    assert {"args.yaml", "last.pth.tar", "model_best.pth.tar", "curves.png", "train.log", "tensorboard"} < names
    assert "recovery.pth.tar" not in names
    assert not [name for name in names if name.endswith(".tmp")]
    assert Image.open(folder / "curves.png").size[0] > 500
    assert yaml.safe_load((folder / "args.yaml").read_text())["epochs"] == 2
    log = (folder / "train.log").read_text()
    assert "epoch 0 [6/6]" in log
    assert "images/s" in log
    assert "ETA of the run 0:0" in log
    assert log.splitlines()[-1].split(" ", 2)[2] in capsys.readouterr().out

    checkpoint = read_checkpoint(folder / run_folder.LAST)
    assert checkpoint["classes"] == ["digit 0", "digit 1", "digit 2"]
    assert checkpoint["model_kwargs"]["num_classes"] == 3
    assert checkpoint["epoch"] == 1
    assert checkpoint["arch"] == name
    model = mambavision.create_model(name, **checkpoint["model_kwargs"])
    mambavision.load_checkpoint(model, folder / run_folder.BEST, ema=True)


def test_only_the_best_epochs_are_kept(train, monkeypatch):
    scores = iter([50.0, 70.0, 60.0, 65.0, 70.0])
    monkeypatch.setattr(Trainer, "_scores", lambda self: {"raw": {"top1": next(scores), "top5": 0, "loss": 0}})
    folder = train("--epochs", "5", "--checkpoint-hist", "2")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1.pth.tar", "checkpoint-4.pth.tar"]
    assert read_checkpoint(folder / run_folder.BEST)["epoch"] == 1
    assert read_checkpoint(folder / run_folder.LAST)["epoch"] == 4


@pytest.mark.parametrize(
    "words",
    [
        ["--no-aug"],
        ["--amp", "--bfloat", "--channels-last"],
        ["--amp"],
        ["--grad-checkpointing", "--clip-mode", "agc", "--clip-grad", "0.1"],
        ["--mixup", "0", "--cutmix", "0", "--aug-splits", "2", "--jsd-loss", "--split-bn", "--resplit"],
        ["--bce-loss", "--bce-target-thresh", "0.2", "--clip-mode", "value"],
        ["--aug-repeats", "2", "--epoch-repeats", "1", "--layer-decay", "0.8"],
        ["--mixup-mode", "elem", "--mixup-off-epoch", "1", "--opt", "sgd", "--clip-grad", "0"],
        ["--cutmix-minmax", "0.2", "0.8", "--lr-ep", "--sched", "step", "--decay-epochs", "1"],
        ["--sched", "plateau", "--warmup-epochs", "0", "--patience-epochs", "0", "--eval-metric", "loss"],
        ["--model-ema", "--model-ema-force-cpu", "--no-saver", "--save-images", "--log-interval", "1"],
        ["--torchcompile", "aot_eager", "--drop-path", "0.1"],
        ["--drop-path", "0.1", "--drop-rate", "0.1", "--attn-drop-rate", "0.1"],
        ["--lmdb-dataset", "--exif-transpose", "--log-dir", "boards/", "--experiment", "named", "--num-classes", "5"],
        [
            "--input-size",
            "1",
            "32",
            "32",
            "--mean",
            "0.5",
            "--std",
            "0.5",
            "--crop-pct",
            "0.9",
            "--crop-mode",
            "border",
        ],
    ],
    ids=" ".join,
)
def test_options_work(train, words):
    folder = train("--epochs", "2", *words)
    assert len(summary(folder)) == 2
    assert ("--no-saver" in words) != (folder / run_folder.LAST).exists()
    assert ("--save-images" in words) == bool(list(folder.glob("train-epoch1-batch5.jpg")))
    if "--log-dir" in words:
        assert list(Path("boards_exp").iterdir())
        assert folder.name == "named"


def test_broken_images_are_counted(train, digits, tmp_path, capsys):
    data = shutil.copytree(digits, tmp_path / "data")
    for broken in (data / "train" / "digit 0" / "01.png", data / "val" / "digit 0" / "21.png"):
        broken.write_bytes(b"")
    with pytest.raises(DataError, match=r"digit 0/01\.png: cannot be decoded"):
        train(data=data)
    train("--skip-corrupt", data=data)
    log = capsys.readouterr().out
    assert "1 of 60 images could not be decoded" in log
    assert "1 of 15 images could not be decoded" in log


def test_validating_only_writes_nothing(train, capsys):
    assert train("--validate-only") is None
    assert "raw: top-1" in capsys.readouterr().out


# Initial weights


def test_initial_weights(train, tmp_path, capsys):
    other = mambavision.create_model("mamba_vision_T", **SMALL["mamba_vision_T"])
    mambavision.save_checkpoint({"state_dict": other.state_dict()}, tmp_path / "ten_classes.pth")
    still = ["--lr", "0", "--warmup-lr", "0", "--min-lr", "0"]
    with pytest.raises(CheckpointError, match=r"10 classes, the model has 3.*--skip-head"):
        train("--initial-checkpoint", tmp_path / "ten_classes.pth")
    assert not (tmp_path / "output").exists()
    for name, words in {"a": ["--skip-head", "--initial-checkpoint"], "b": ["--loadcheckpoint"]}.items():
        folder = train(*still, *words, tmp_path / "ten_classes.pth", "--experiment", name)
        assert torch.equal(
            weights(folder)["levels.3.blocks.0.mlp.fc1.weight"], other.levels[3].blocks[0].mlp.fc1.weight
        )
    assert "2 of another shape (head.weight, head.bias)" in capsys.readouterr().out


# Errors before work starts


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--model", "mamba_vision_t"], UserError, "Did you mean 'mamba_vision_T'"),
        (["--model-kwargs", "depth=1"], UserError, "unexpected keyword argument 'depth'. Did you mean 'depths'"),
        (["--opt", "lambb"], UserError, "unknown optimizer --opt lambb. Did you mean 'lamb'"),
        (["--resume", "nothing.pth.tar"], CheckpointError, r"nothing\.pth\.tar: no such file"),
        (["--output", "file/below"], OutputError, "file/below/exp/args.yaml: cannot be written"),
        (["--output", "/proc/below"], OutputError, "/proc/below/exp/args.yaml: cannot be written"),
        (["--log-dir", "/proc/below"], OutputError, "/proc/below_exp/args.yaml: cannot be written"),
        (["--lr", "-1"], UserError, "--lr -1: must be 0 or more"),
        (["--drop-path", "2"], UserError, "--drop-path 2: must be from 0 to 1"),
        (["--opt-betas", "0.9", "1"], UserError, "--opt-betas 1: must be at least 0 and less than 1"),
        (["--aa", "nonsense"], UserError, "--aa nonsense: Unknown AA policy nonsense; give a policy of timm"),
        (["--aa", "rand-m9-foo1"], UserError, "--aa rand-m9-foo1: Unknown RandAugment config section"),
        (["--mesa", "1"], UserError, "add --model-ema"),
        (["--batch-size", "7"], UserError, "must be even for mixup"),
        (["--jsd-loss"], UserError, "--aug-splits of at least 2"),
        (["--num-classes", "2"], UserError, "less than the 3 classes"),
        (["--device", "toaster"], UserError, "unknown device"),
        (["--epochs", "0"], UserError, "--epochs 0: must be from 1 to 1,000,000"),
        (["--batch-size", "100"], UserError, "exceeds the 60 training images of a process"),
    ],
)
def test_wrong_requests_create_nothing(train, tmp_path, words, error, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        train(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routes": "diagonal"}, r"vmamba_tiny_s1l8: routes must be one of 'cross', .*, got 'diagonal'\.$"),
        ({"ssm_act_layer": "swish"}, "ssm_act_layer must be one of 'silu', 'gelu', 'relu', 'sigmoid', got 'swish'"),
        ({"ssm_init": "v1"}, "ssm_init must be one of 'mamba', 'normal', 'uniform', got 'v1'"),
        ({"route": "cross"}, r"got an unexpected keyword argument 'route'\. Did you mean 'routes'\?$"),
        ({"forward_type": "v05_noz"}, r"got an unexpected keyword argument 'forward_type'\.$"),
    ],
)
def test_options_of_the_scan_are_checked(arguments, message):
    with pytest.raises(UserError, match=message):
        create_any("vmamba_tiny_s1l8", False, arguments)


def test_folders_that_differ_create_nothing(train, digits, tmp_path):
    data = shutil.copytree(digits, tmp_path / "data")
    shutil.rmtree(data / "val" / "digit 2")
    with pytest.raises(DataError, match=r"classes of the validation data differ .*lacks 'digit 2'"):
        train(data=data)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_runs_of_the_same_second_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda pattern: "20260101-000000")
    folders = []
    for _ in range(3):
        folders.append(run_folder.new_run_folder(str(tmp_path), "", "", "resnet", 32))
        folders[-1].mkdir()
    names = ["20260101-000000-resnet-32", "20260101-000000-resnet-32-2", "20260101-000000-resnet-32-3"]
    assert [folder.name for folder in folders] == names


def test_existing_runs_are_not_overwritten(train, copy_of_run):
    folder = copy_of_run(name="one")
    with pytest.raises(UserError, match="already contains a run; resume it with --resume auto"):
        train("--experiment", "one")
    assert len(summary(folder)) == 2


# Progress


def test_remaining_time_counts_the_epochs_left(prepare, caplog, monkeypatch):
    small = prepare("--epochs", "11", "--no-saver")
    monkeypatch.setattr(small, "_train_epoch", lambda epoch: (1.0, 1.0))
    monkeypatch.setattr(small, "_scores", lambda: {"raw": {"top1": 1.0, "top5": 1.0, "loss": 1.0}})
    monkeypatch.setattr(time, "monotonic", itertools.count(0, 60).__next__)  # an epoch takes a minute
    with caplog.at_level("INFO"):
        small._run_epoch(4, None)
    assert caplog.messages[-1].endswith("ETA of the run 0:06:00")


# Schedules


# Many processes


def test_two_processes(digits, tmp_path):
    """By torch.distributed.launch; torchrun starts those of test_preempted_training.py."""
    command = ["-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port", "29611"]
    words = ["--data_dir", str(digits), "--tag", "two", "--model-ema", "--log-interval", "1"]
    result = subprocess.run(
        [sys.executable, *command, str(ROOT / "classification/train.py"), *SETTING, *words],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "cpu x 2" in result.stdout
    (folder,) = (tmp_path / "output/train/two").iterdir()
    assert len(summary(folder)) == 2
    ranks = [state["random"] for state in read_checkpoint(folder / run_folder.LAST)["processes"]]
    assert len(ranks) == 2
    assert not torch.equal(ranks[0]["torch"], ranks[1]["torch"])  # of stochastic depth
    assert not torch.equal(ranks[0]["numpy"][1], ranks[1]["numpy"][1])  # of mixup
