"""train.py: runs, what they leave behind, and going on after an interruption."""

import csv
import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import mambavision
from conftest import ROOT, SMALL
from engine import build, run, trainer
from engine.options import train_options
from engine.task import MesaTask
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import CheckpointError, DataError, OutputError, UserError

KWARGS = [f"{key}={value}" for key, value in SMALL["mamba_vision_T"].items() if key != "num_classes"]
SETTING = [
    "--model", "mamba_vision_T", "--model-kwargs", *KWARGS, "--input-size", "3", "32", "32", "--device", "cpu",
    "--batch-size", "10", "--workers", "0", "--epochs", "2", "--warmup-epochs", "1", "--cooldown-epochs", "0",
    "--lr", "1e-3", "--hflip", "0", "--deterministic",
]  # fmt: skip


@pytest.fixture
def train(digits, tmp_path, monkeypatch):
    """Train in this process, in a folder of its own; return the run's folder."""
    monkeypatch.chdir(tmp_path)

    def start(*words, data=digits):
        trainer.train(train_options([*SETTING, "--data-dir", str(data), *map(str, words)]))
        folders = sorted(tmp_path.glob("output/train/exp/*"))
        return folders[-1] if folders else None

    yield start
    torch.use_deterministic_algorithms(False)


def weights(folder, name=run.LAST, key="state_dict"):
    return read_checkpoint(folder / name)[key]


def identical(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def summary(folder):
    with (folder / run.SUMMARY).open(newline="") as file:
        return list(csv.DictReader(file))


# A run


def test_a_run_leaves_everything_behind(train, capsys):
    folder = train("--model-ema")
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
    assert "ETA" in log
    assert log.splitlines()[-1].split(" ", 2)[2] in capsys.readouterr().out

    checkpoint = read_checkpoint(folder / run.LAST)
    assert checkpoint["classes"] == ["digit 0", "digit 1", "digit 2"]
    assert checkpoint["model_kwargs"]["num_classes"] == 3
    assert checkpoint["epoch"] == 1
    model = mambavision.create_model(checkpoint["arch"], **checkpoint["model_kwargs"])
    mambavision.load_checkpoint(model, folder / run.BEST, ema=True)


def test_only_the_best_epochs_are_kept(train, monkeypatch):
    scores = iter([50.0, 70.0, 60.0, 65.0, 70.0])
    monkeypatch.setattr(trainer.Trainer, "_scores", lambda self: {"raw": {"top1": next(scores), "top5": 0, "loss": 0}})
    folder = train("--epochs", "5", "--checkpoint-hist", "2")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1.pth.tar", "checkpoint-4.pth.tar"]
    assert read_checkpoint(folder / run.BEST)["epoch"] == 1
    assert read_checkpoint(folder / run.LAST)["epoch"] == 4


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
    assert ("--no-saver" in words) != (folder / run.LAST).exists()
    assert ("--save-images" in words) == bool(list(folder.glob("train-epoch1-batch5.jpg")))
    if "--log-dir" in words:
        assert list(Path("boards_exp").iterdir())
        assert folder.name == "named"


def test_accumulated_batches_share_a_step(train):
    folder = train("--grad-accum-steps", "4")
    assert read_checkpoint(folder / run.LAST)["updates"] == 2 * 2  # 6 batches: groups of 4 and 2


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


# Going on


class InterruptionError(Exception):
    """Stands for whatever ends a process."""


FULL = ["--epochs", "4", "--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "2", "--mesa", "0.5",
        "--mesa-start-ratio", "0.1", "--drop-path", "0.3", "--workers", "2"]  # fmt: skip


def test_resumed_run_ends_like_an_uninterrupted_one(train, monkeypatch):
    uninterrupted = train(*FULL, "--experiment", "uninterrupted")
    whole = {key: weights(uninterrupted, key=key) for key in ("state_dict", "state_dict_ema")}
    rows = summary(uninterrupted)

    finish = trainer.Trainer._run_epoch

    def stop_in_epoch_2(self, epoch, reporter):
        if epoch == 2:
            raise InterruptionError
        finish(self, epoch, reporter)

    monkeypatch.setattr(trainer.Trainer, "_run_epoch", stop_in_epoch_2)
    with pytest.raises(InterruptionError):
        train(*FULL, "--experiment", "interrupted")
    monkeypatch.setattr(trainer.Trainer, "_run_epoch", finish)
    torch.manual_seed(1234)
    folder = train(*FULL, "--resume", "output/train/exp/interrupted/last.pth.tar")
    assert folder.parent / "interrupted" == Path("output/train/exp/interrupted").absolute()
    resumed = Path("output/train/exp/interrupted")
    for key, expected in whole.items():
        assert identical(weights(resumed, key=key), expected)
    timeless = [{key: value for key, value in row.items() if "per_second" not in key} for row in summary(resumed)]
    assert timeless == [{key: value for key, value in row.items() if "per_second" not in key} for row in rows]


def test_run_can_be_taken_up_inside_an_epoch(train, monkeypatch):
    words = [*FULL, "--recovery-interval", "1"]
    expected = weights(train(*words, "--experiment", "uninterrupted"))
    steps, backward = itertools.count(), trainer.Trainer._backward

    def stop_in_epoch_1(self, loss, is_step):
        if next(steps) == 11:  # six batches an epoch: the last one of epoch 1
            raise InterruptionError
        backward(self, loss, is_step)

    monkeypatch.setattr(trainer.Trainer, "_backward", stop_in_epoch_1)
    with pytest.raises(InterruptionError):
        train(*words, "--experiment", "interrupted")
    monkeypatch.setattr(trainer.Trainer, "_backward", backward)
    shutil.rmtree("output/train/exp/uninterrupted")
    recovery = read_checkpoint(Path("output/train/exp/interrupted") / run.RECOVERY)
    assert (recovery["epoch"], recovery["next_batch"]) == (1, 4)
    folder = train(*words, "--resume", "auto")
    assert identical(weights(folder), expected)
    assert not (folder / run.RECOVERY).exists()
    losses = [float(row["train_loss"]) for row in summary(folder)]
    assert len(losses) == 4


def test_plateau_remembers_its_patience(train):
    words = ["--sched", "plateau", "--warmup-epochs", "0", "--patience-epochs", "1", "--decay-rate", "0.5"]
    words += ["--eval-metric", "loss", "--lr", "0", "--warmup-lr", "0"]  # nothing improves
    expected = read_checkpoint(train(*words, "--epochs", "4", "--experiment", "whole") / run.LAST)["plateau"]
    train(*words, "--epochs", "2", "--experiment", "part")
    folder = train(*words, "--epochs", "4", "--resume", "output/train/exp/part/last.pth.tar")
    assert read_checkpoint(Path("output/train/exp/part") / run.LAST)["plateau"] == expected
    assert folder is not None


def test_automatic_resume_takes_the_newest_whole_checkpoint(train, capsys):
    folder = train("--epochs", "3", "--resume", "auto", "--checkpoint-hist", "3")
    assert "nothing to resume" in capsys.readouterr().out
    assert len(list(folder.glob("checkpoint-*"))) == 3
    for newest in (folder / run.LAST, folder / "checkpoint-2.pth.tar"):
        newest.unlink()
        newest.write_bytes(b"half a check")
    again = train("--epochs", "4", "--resume", "auto")
    log = capsys.readouterr().out
    assert "passed over" in log
    assert f"resuming {folder.relative_to(Path.cwd())}/checkpoint-1.pth.tar" in log
    assert again == folder
    assert [row["epoch"] for row in summary(folder)] == ["0", "1", "2", "3"]


def test_finished_run_has_nothing_left_to_do(train, capsys):
    folder = train()
    train("--resume", folder / run.LAST)
    assert "all 2 epochs of this run are done" in capsys.readouterr().out


def test_foreign_checkpoints_start_a_folder_of_their_own(train, tmp_path):
    folder = train()
    foreign = tmp_path / "downloads" / "checkpoint.pth.tar"
    foreign.parent.mkdir()
    checkpoint = read_checkpoint(folder / run.LAST)
    kept = {key: checkpoint[key] for key in ("epoch", "arch", "state_dict", "optimizer", "version", "args")}
    mambavision.save_checkpoint(kept, foreign)
    shutil.rmtree(folder)
    assert len(summary(train("--epochs", "3", "--resume", foreign))) == 1
    assert [path.name for path in foreign.parent.iterdir()] == ["checkpoint.pth.tar"]
    del kept["optimizer"]
    mambavision.save_checkpoint(kept, foreign)
    with pytest.raises(CheckpointError, match=r"no optimizer state; add --no-resume-opt"):
        train("--epochs", "3", "--resume", foreign)
    train("--epochs", "3", "--resume", foreign, "--no-resume-opt", "--experiment", "weights only")


def test_resuming_needs_the_same_classes(train, digits, tmp_path):
    folder = train()
    data = shutil.copytree(digits, tmp_path / "data")
    for split in ("train", "val"):
        (data / split / "digit 1").rename(data / split / "digit 9")
    with pytest.raises(DataError, match=r"classes of the data differ from those of the checkpoint: .*lacks 'digit 1'"):
        train("--resume", folder / run.LAST, data=data)


# Errors before work starts


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--model", "mamba_vision_t"], UserError, "Did you mean 'mamba_vision_T'"),
        (["--model-kwargs", "depth=1"], UserError, "unexpected keyword argument 'depth'"),
        (["--opt", "lambb"], UserError, "unknown optimizer --opt lambb. Did you mean 'lamb'"),
        (["--resume", "nothing.pth.tar"], CheckpointError, r"nothing\.pth\.tar: no such file"),
        (["--output", "file/below"], OutputError, "file/below: cannot be written, because of .*file"),
        (["--mesa", "1"], UserError, "add --model-ema"),
        (["--sync-bn"], UserError, "needs GPUs"),
        (["--batch-size", "7"], UserError, "must be even for mixup"),
        (["--jsd-loss"], UserError, "--aug-splits of at least 2"),
        (["--num-classes", "2"], UserError, "less than the 3 classes"),
        (["--device", "toaster"], UserError, "unknown device"),
        (["--epochs", "0"], UserError, "at least 1"),
        (["--batch-size", "100"], UserError, "more than the 60 training images"),
    ],
)
def test_wrong_requests_create_nothing(train, tmp_path, words, error, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        train(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
        folders.append(run.new_run_folder(str(tmp_path), "", "", "resnet", 32))
        folders[-1].mkdir()
    names = ["20260101-000000-resnet-32", "20260101-000000-resnet-32-2", "20260101-000000-resnet-32-3"]
    assert [folder.name for folder in folders] == names


def test_existing_runs_are_not_overwritten(train):
    folder = train("--experiment", "one")
    with pytest.raises(UserError, match="holds a run already; continue it with --resume auto"):
        train("--experiment", "one")
    assert len(summary(folder)) == 2


# Not a number


def test_loss_that_is_not_finite_stops_before_the_step(train, monkeypatch):
    forward, batches = MesaTask.forward, itertools.count()

    def poisoned(self, images, targets):
        result = forward(self, images, targets)
        return result | {"loss": result["loss"] * (math.nan if next(batches) == 8 else 1.0)}

    seen = []
    step = trainer.Trainer._require_finite
    monkeypatch.setattr(MesaTask, "forward", poisoned)
    monkeypatch.setattr(
        trainer.Trainer,
        "_require_finite",
        lambda self, *about: (seen.append(self.task.trainable_module.head.weight.clone()), step(self, *about)),
    )
    words = ["--model-ema", "--mesa", "0.1", "--mesa-start-ratio", "9"]
    with pytest.raises(
        trainer.NonFiniteLossError, match=r"in epoch 1, batch 2, .*last\.pth\.tar is untouched"
    ) as error:
        train(*words)
    assert error.value.exit_status == 65
    (folder,) = Path("output/train/exp").iterdir()
    checkpoint = read_checkpoint(folder / run.LAST)
    assert checkpoint["epoch"] == 0
    assert torch.equal(checkpoint["state_dict"]["head.weight"], seen[6])
    assert len(seen) == 9
    assert not torch.equal(seen[8], seen[7])


# Self-distillation


def test_distillation_is_the_published_term():
    torch.manual_seed(0)
    model = mambavision.create_model("mamba_vision_T", **SMALL["mamba_vision_T"], drop_path_rate=0.0)
    task = MesaTask(model, 0.5, verbose=False)
    task.setup_ema(decay=0.9)
    teacher = task.get_eval_model(ema=True)
    with torch.no_grad():
        teacher.module.head.weight.mul_(5)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    task.train()
    assert model.training
    assert not teacher.training
    task.distilling = True
    result = task(images, targets)
    taught = (teacher(images) / 3).softmax(1)
    log_ratio = taught.log() - (result["output"] / 3).log_softmax(1)
    divergence = (taught * log_ratio).sum(1).mean()
    expected = torch.nn.functional.cross_entropy(result["output"], targets) + 0.5 * 50 * divergence
    torch.testing.assert_close(result["loss"], expected)
    result["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


# Schedules


def rates(words, batches, at):
    args = train_options(words)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, epochs = build.build_scheduler(args, optimizer, batches, world_size=8)
    found = {}
    for epoch in range(epochs):
        for batch in range(batches):
            scheduler.step_update(epoch * batches + batch + 1)
            if batch == 0:
                found[epoch] = optimizer.param_groups[0]["lr"]
        scheduler.step(epoch + 1, 0.0)
    return epochs, [found[epoch] for epoch in at]


def test_learning_rates_are_the_published_ones():
    recipe = str(ROOT / "classification/configs/mambavision/mambavision_tiny_1k.yaml")
    words = ["--config", recipe, "--data-len", "1281167", "--batch-size", "128"]
    epochs, found = rates(words, 1251, [0, 10, 50, 200, 309, 319])
    assert epochs == 320
    assert found == pytest.approx([1.2e-6, 2.5e-3, 4.69e-3, 1.40e-3, 5.13e-6, 5e-6], rel=5e-3)


@pytest.mark.parametrize("by_epoch", [[], ["--lr-ep"]])
@pytest.mark.parametrize("schedule", ["cosine", "tanh", "step", "multistep", "poly", "plateau", "constant"])
def test_every_schedule_warms_up_and_goes_on(schedule, by_epoch):
    words = ["--sched", schedule, "--epochs", "20", "--warmup-epochs", "4", "--decay-epochs", "8", "--lr", "1e-3"]
    words += ["--decay-milestones", "8", "12", "--cooldown-epochs", "2", "--min-lr", "1e-6", "--patience-epochs", "2"]
    epochs, found = rates([*words, *by_epoch], 10, range(20))
    assert epochs in (20, 22)
    assert found[0] < 0.3e-3 < 0.6e-3 < max(found[4:7]) <= 1e-3 * 1.0001
    assert schedule == "constant" or found[19] < found[5]
    assert len({round(rate, 12) for rate in found[4:]}) > 1 or schedule == "constant"


# Many processes

LAUNCHERS = {
    "torch.distributed.launch": ["-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port", "{port}"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-endpoint", "localhost:{port}"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(launcher, digits, tmp_path):
    port = {"torch.distributed.launch": 29611, "torchrun": 29612}[launcher]
    command = [word.format(port=port) for word in LAUNCHERS[launcher]]
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
    assert len(read_checkpoint(folder / run.LAST)["random"]) == 2
