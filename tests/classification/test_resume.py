"""Resuming train.py after an interruption."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch

import mambavision
from engine import learner, report, run_folder
from engine.train import Trainer
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import CheckpointError, DataError
from mambavision.running.newest import newest_valid
from small_runs import identical, summary, timeless, weights


class InterruptionError(Exception):
    """A simulated crash."""


FULL = ["--epochs", "4", "--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "2", "--mesa", "0.5",
        "--mesa-start-ratio", "0.1", "--drop-path", "0.3", "--workers", "2"]  # fmt: skip


def test_resumed_run_ends_like_an_uninterrupted_one(train, trained, monkeypatch):
    uninterrupted = trained(*FULL)
    whole = {key: weights(uninterrupted, key=key) for key in ("state_dict", "state_dict_ema")}
    rows = timeless(uninterrupted)

    finish = Trainer._run_epoch

    def stop_in_epoch_2(self, epoch, reporter):
        if epoch == 2:
            raise InterruptionError
        finish(self, epoch, reporter)

    monkeypatch.setattr(Trainer, "_run_epoch", stop_in_epoch_2)
    with pytest.raises(InterruptionError):
        train(*FULL, "--experiment", "interrupted")
    monkeypatch.setattr(Trainer, "_run_epoch", finish)
    torch.manual_seed(1234)
    folder = train(*FULL, "--resume", "output/train/exp/interrupted/last.pth.tar")
    assert folder.parent / "interrupted" == Path("output/train/exp/interrupted").absolute()
    resumed = Path("output/train/exp/interrupted")
    for key, expected in whole.items():
        assert identical(weights(resumed, key=key), expected)
    assert timeless(resumed) == rows


def test_run_resumes_mid_epoch(train, trained, monkeypatch):
    words = [*FULL, "--recovery-interval", "1"]
    expected = weights(trained(*FULL))
    steps, backward = itertools.count(), learner.Learner.backward

    def stop_in_epoch_1(self, loss):
        if next(steps) == 11:  # six batches an epoch: the last one of epoch 1
            raise InterruptionError
        backward(self, loss)

    monkeypatch.setattr(learner.Learner, "backward", stop_in_epoch_1)
    with pytest.raises(InterruptionError):
        train(*words, "--experiment", "interrupted")
    monkeypatch.setattr(learner.Learner, "backward", backward)
    recovery = read_checkpoint(Path("output/train/exp/interrupted") / run_folder.RECOVERY)
    assert (recovery["epoch"], recovery["next_batch"]) == (1, 4)
    folder = train(*words, "--resume", "auto")
    assert identical(weights(folder), expected)
    assert not (folder / run_folder.RECOVERY).exists()
    losses = [float(row["train_loss"]) for row in summary(folder)]
    assert len(losses) == 4


def test_plateau_remembers_its_patience(train):
    words = ["--sched", "plateau", "--warmup-epochs", "0", "--patience-epochs", "1", "--decay-rate", "0.5"]
    words += ["--eval-metric", "loss", "--lr", "0", "--warmup-lr", "0"]  # nothing improves
    expected = read_checkpoint(train(*words, "--epochs", "4", "--experiment", "whole") / run_folder.LAST)["plateau"]
    train(*words, "--epochs", "2", "--experiment", "part")
    folder = train(*words, "--epochs", "4", "--resume", "output/train/exp/part/last.pth.tar")
    assert read_checkpoint(Path("output/train/exp/part") / run_folder.LAST)["plateau"] == expected
    assert folder is not None


def test_auto_resume_picks_newest_intact_checkpoint(train, copy_of_run, capsys):
    folder = copy_of_run("--epochs", "3", "--checkpoint-hist", "3")
    assert len(list(folder.glob("checkpoint-*"))) == 3
    for newest in (folder / run_folder.LAST, folder / "checkpoint-2.pth.tar"):
        newest.unlink()
        newest.write_bytes(b"half a check")
    again = train("--epochs", "4", "--resume", "auto")
    log = capsys.readouterr().out
    assert "skipped" in log
    assert f"resuming {folder.relative_to(Path.cwd())}/checkpoint-1.pth.tar" in log
    assert again == folder
    assert [row["epoch"] for row in summary(folder)] == ["0", "1", "2", "3"]


def test_finished_run_has_nothing_left_to_do(train, copy_of_run, capsys):
    folder = copy_of_run()
    train("--resume", folder / run_folder.LAST)
    assert "all 2 epochs of this run are complete" in capsys.readouterr().out


def test_external_checkpoint_starts_new_folder(train, trained, tmp_path):
    folder = trained()
    foreign = tmp_path / "downloads" / "checkpoint.pth.tar"
    foreign.parent.mkdir()
    checkpoint = read_checkpoint(folder / run_folder.LAST)
    kept = {key: checkpoint[key] for key in ("epoch", "arch", "state_dict", "optimizer", "version", "args")}
    mambavision.save_checkpoint(kept, foreign)
    assert len(summary(train("--epochs", "3", "--resume", foreign))) == 1
    assert [path.name for path in foreign.parent.iterdir()] == ["checkpoint.pth.tar"]
    del kept["optimizer"]
    mambavision.save_checkpoint(kept, foreign)
    with pytest.raises(CheckpointError, match=r"no optimizer state; add --no-resume-opt"):
        train("--epochs", "3", "--resume", foreign)
    train("--epochs", "3", "--resume", foreign, "--no-resume-opt", "--experiment", "weights only")


# Which run


def test_automatic_resume_stays_with_its_run(train, copy_of_run, prepare):
    copy_of_run("--epochs", "1", name="a")
    train("--epochs", "1", "--experiment", "b")
    runs = Path("output/train/exp")
    assert prepare("--resume", "auto").folder == runs / "b"
    assert prepare("--resume", "auto", "--experiment", "a").folder == runs / "a"
    new = prepare("--resume", "auto", "--experiment", "c")
    assert (new.folder, new.first_epoch) == (runs / "c", 0)


def test_tags_separate_runs_of_one_output(train, prepare, capsys):
    train("--epochs", "1", "--output", "out", "--tag", "one", "--resume", "auto")
    assert "nothing to resume" in capsys.readouterr().out
    (folder,) = Path("out/one").iterdir()
    assert prepare("--output", "out", "--tag", "one", "--resume", "auto").folder == folder
    other = prepare("--output", "out", "--tag", "two", "--resume", "auto")
    assert other.folder.parent == Path("out/two")
    assert other.first_epoch == 0


# Checkpoints that do not fit


def test_resuming_needs_the_same_classes(train, copy_of_run, digits, tmp_path):
    folder = copy_of_run()
    data = shutil.copytree(digits, tmp_path / "data")
    for split in ("train", "val"):
        (data / split / "digit 1").rename(data / split / "digit 9")
    with pytest.raises(DataError, match=r"classes of the data differ from those of the checkpoint: .*lacks 'digit 1'"):
        train("--resume", folder / run_folder.LAST, data=data)


@pytest.fixture
def checkpoint(prepare):
    """The path of a checkpoint of a finished epoch, and its content."""
    fresh = prepare("--experiment", "written before")
    fresh._save(0)
    path = fresh.folder / run_folder.LAST
    return path, read_checkpoint(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model-kwargs", "depths=1,1,1,2"], "belongs to another model: .* unexpected"),
        (["--opt", "sgd"], r"its optimizer state does not fit \(--opt was adamw and is sgd\); .*--no-resume-opt"),
        (["--opt", "adam"], "its optimizer state does not fit"),
        (["--layer-decay", "0.8"], "its optimizer state .* give --opt, --layer-decay and --weight-decay as before"),
    ],
)
def test_options_must_fit_the_checkpoint(prepare, checkpoint, words, message):
    path, _ = checkpoint
    with pytest.raises(CheckpointError, match=rf"last\.pth\.tar: {message}"):
        prepare("--resume", path, *words)


def test_optimizer_must_fit_when_the_file_does_not_name_it(prepare, checkpoint):
    path, content = checkpoint
    del content["args"]
    mambavision.save_checkpoint(content, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        prepare("--resume", path, "--opt", "sgd")
    assert prepare("--resume", path).first_epoch == 1
    assert prepare("--resume", path, "--opt", "sgd", "--no-resume-opt").first_epoch == 1


def test_prefixes_of_wrappers_do_not_matter(prepare, checkpoint):
    path, content = checkpoint
    expected = content["state_dict"]
    content["state_dict"] = {f"module.{key}": torch.ones_like(value) for key, value in expected.items()}
    mambavision.save_checkpoint(content, path)
    model = prepare("--resume", path).learner.task.trainable_module
    assert all((value == 1).all() for value in model.state_dict().values())


def test_vmamba_checkpoint_resumes_without_optimizer(prepare, tmp_path):
    """VMamba orders its parameter groups differently."""
    ours = {"model": "vmamba_tiny_s1l8"}
    trainer = prepare(**ours)
    model, optimizer = trainer.learner.task.trainable_module.state_dict(), trainer.learner.optimizer.state_dict()
    optimizer["param_groups"].reverse()
    averaged = {key: value + 1 for key, value in model.items()}
    path = tmp_path / "ckpt_epoch_0.pth"
    mambavision.save_checkpoint({"model": model, "model_ema": averaged, "optimizer": optimizer, "epoch": 0}, path)
    with pytest.raises(CheckpointError, match=r"ckpt_epoch_0\.pth: its optimizer state .* --no-resume-opt"):
        prepare("--resume", path, **ours)
    resumed = prepare("--resume", path, "--no-resume-opt", "--model-ema", **ours)
    assert resumed.first_epoch == 1
    assert identical(resumed.learner.task.trainable_module.state_dict(), model)
    assert identical(resumed.learner.task.get_eval_model(ema=True).module.state_dict(), averaged)


def test_weights_only_checkpoint_cannot_be_resumed(prepare, checkpoint):
    path, content = checkpoint
    mambavision.save_checkpoint({"state_dict": content["state_dict"]}, path)
    for words in ([], ["--no-resume-opt"]):
        with pytest.raises(
            CheckpointError, match=r"last\.pth\.tar: does not contain its epoch; .* --initial-checkpoint"
        ):
            prepare("--resume", path, *words)


# Inside an epoch


@pytest.fixture
def recovery(prepare):
    """A checkpoint after four of the six batches of epoch 1."""
    fresh = prepare("--experiment", "interrupted")
    fresh.epoch_so_far = {"loss_sum": 80.0, "images": 40}
    fresh._save(1, next_batch=4)
    return fresh.folder / run_folder.RECOVERY


def position(trained):
    return trained.first_epoch, trained.first_batch, trained.epoch_so_far["images"], trained.learner.updates


def test_mid_epoch_resume_requires_same_batches(prepare, recovery, caplog):
    assert position(prepare("--resume", recovery, "--lr", "1")) == (1, 4, 40, 10)
    assert "is repeated" not in caplog.text
    for words, steps in {("--batch-size", 30): 2, ("--seed", 1): 6, ("--grad-accum-steps", 3): 2}.items():
        caplog.clear()
        assert position(prepare("--resume", recovery, *words)) == (1, 0, 0, steps)
        assert "epoch 1 is repeated: its batches have changed since the interruption" in caplog.text


def test_epoch_starts_over_with_another_number_of_processes(prepare, recovery, caplog):
    content = read_checkpoint(recovery)
    content["batching"]["processes"] = 8
    content["processes"] *= 8
    mambavision.save_checkpoint(content, recovery)
    assert position(prepare("--resume", recovery)) == (1, 0, 0, 6)
    assert "epoch 1 is repeated" in caplog.text
    assert "the run had 8 processes and now has 1: its random numbers differ" in caplog.text


def test_restarted_epoch_runs_all_batches(train, recovery):
    (row,) = summary(train("--resume", recovery, "--batch-size", "30", "--experiment", "other"))
    assert row["epoch"] == "1"
    assert float(row["train_loss"]) < 1.9  # 2.0 in the part before the interruption


def test_epoch_without_batches_left(prepare, recovery):
    late = prepare("--resume", recovery)
    late.first_batch = 6
    assert late._train_epoch(1) == (2.0, 0.0)


# Another epoch


@pytest.mark.parametrize("schedule", [[], ["--lr-ep"], ["--sched", "plateau", "--patience-epochs", "9"]], ids=" ".join)
def test_start_epoch_moves_the_schedule(train, prepare, schedule):
    words = ["--epochs", "4", "--warmup-epochs", "2", *schedule]
    whole = train(*words, "--experiment", "a whole run")
    rates = [row["lr"] for row in summary(whole)]
    later = train(*words, "--start-epoch", "3", "--experiment", "later")
    assert [row["lr"] for row in summary(later)] == rates[3:]
    train(*words, "--resume", whole / run_folder.LAST, "--start-epoch", "1")
    assert [row["lr"] for row in summary(whole)] == rates


def test_start_epoch_overrides_mid_epoch_position(prepare, recovery):
    assert position(prepare("--resume", recovery, "--start-epoch", "3")) == (3, 0, 0, 18)
    assert position(prepare("--resume", recovery, "--start-epoch", "1")) == (1, 0, 0, 6)


# Which checkpoints are kept


def finish_epoch(checkpoints, epoch, metric):
    is_best = checkpoints.rank(epoch, metric)
    checkpoints.write({"metric": metric, "checkpoints": checkpoints.state()}, epoch, is_best)


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_interrupted_writing_keeps_the_best_weights(tmp_path, monkeypatch, replaced):
    """The file of the best weights is at least as good as the best that the newest checkpoint records."""
    checkpoints = run_folder.Checkpoints(tmp_path / "run", keep=2, lower_is_better=False)
    finish_epoch(checkpoints, 0, 50.0)
    steps, replace = itertools.count(), os.replace

    def fail(source, target):
        if next(steps) == replaced:
            raise InterruptionError
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InterruptionError):
        finish_epoch(checkpoints, 1, 60.0)
    _, newest = newest_valid(run_folder.checkpoints_in(tmp_path / "run"))
    assert read_checkpoint(tmp_path / "run" / run_folder.BEST)["metric"] >= newest["checkpoints"]["best"][1]


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_metrics_that_are_not_finite_are_worst(tmp_path, lower_is_better):
    checkpoints = run_folder.Checkpoints(tmp_path, keep=1, lower_is_better=lower_is_better)
    for epoch, metric in enumerate([float("nan"), 5.0, float("inf"), float("-inf"), float("nan")]):
        finish_epoch(checkpoints, epoch, metric)
    assert checkpoints.best == (1, 5.0)
    assert checkpoints.kept == [(1, 5.0)]
    assert read_checkpoint(tmp_path / run_folder.BEST)["metric"] == 5.0


def test_repeated_epoch_replaces_its_first_checkpoint(tmp_path):
    checkpoints = run_folder.Checkpoints(tmp_path, keep=2, lower_is_better=False)
    for epoch, metric in [(0, 50.0), (1, 60.0), (1, 55.0), (2, 70.0)]:
        finish_epoch(checkpoints, epoch, metric)
    assert checkpoints.kept == [(2, 70.0), (1, 55.0)]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1.pth.tar", "checkpoint-2.pth.tar"}


# Which is the newest


def test_modification_times_are_ignored(copy_of_run, prepare):
    folder = copy_of_run("--epochs", "3", "--checkpoint-hist", "3")
    for age, path in enumerate(sorted(folder.glob("*.pth.tar"))):  # last.pth.tar looks oldest
        os.utime(path, (10**9 - age, 10**9 - age))
    shutil.copy(folder / "checkpoint-0.pth.tar", folder / "checkpoint-9.pth.tar")
    (folder / "checkpoint-9.pth.tar").touch()
    assert prepare("--resume", "auto").first_epoch == 3
    (folder / run_folder.LAST).unlink()
    assert prepare("--resume", "auto").first_epoch == 3
    (folder / "checkpoint-2.pth.tar").unlink()
    assert prepare("--resume", "auto").first_epoch == 2


def test_auto_resume_continues_from_rewound_epoch(train, prepare):
    folder = train("--epochs", "4", "--checkpoint-hist", "4")
    train("--epochs", "2", "--checkpoint-hist", "4", "--resume", folder / "checkpoint-0.pth.tar")
    assert (folder / "checkpoint-3.pth.tar").exists()
    assert [row["epoch"] for row in summary(folder)] == ["0", "1"]
    assert prepare("--resume", "auto").first_epoch == 2


def test_auto_resume_picks_last_resumed_run(train, copy_of_run, prepare):
    copy_of_run("--epochs", "1", name="a")
    train("--epochs", "2", "--experiment", "b")
    train("--epochs", "2", "--resume", "output/train/exp/a/last.pth.tar")
    for path in Path("output/train/exp/a").iterdir():
        os.utime(path, (1, 1))
    assert prepare("--resume", "auto").folder == Path("output/train/exp/a")


# The summary


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_no_row_is_lost_between_checkpoint_and_summary(train, trained, monkeypatch, epoch, moment):
    undisturbed = timeless(trained("--epochs", "3", "--checkpoint-hist", "3"))
    write, draw = report.write_summary, report.RunReport.draw_curves

    def killed(folder, rows):
        if len(rows) == epoch + 1 and moment == "before":
            raise InterruptionError
        write(folder, rows)
        if len(rows) == epoch + 1:
            raise InterruptionError

    monkeypatch.setattr(report, "write_summary", killed)
    monkeypatch.setattr(report.RunReport, "draw_curves", lambda self: None)
    with pytest.raises(InterruptionError):
        train("--epochs", "3", "--experiment", "killed")
    monkeypatch.setattr(report, "write_summary", write)
    monkeypatch.setattr(report.RunReport, "draw_curves", draw)
    folder = Path("output/train/exp/killed")
    assert len(summary(folder)) == epoch + {"before": 0, "after": 1}[moment]
    train("--epochs", "3", "--experiment", "killed", "--resume", "auto")
    assert timeless(folder) == undisturbed
    assert (folder / report.CURVES).exists()


def test_rows_of_earlier_versions_are_kept(train, copy_of_run):
    folder = copy_of_run()
    before = summary(folder)
    checkpoint = read_checkpoint(folder / run_folder.LAST)
    del checkpoint["summary"]
    mambavision.save_checkpoint(checkpoint, folder / run_folder.LAST)
    train("--epochs", "3", "--resume", folder / run_folder.LAST)
    assert summary(folder)[:2] == before
    assert len(summary(folder)) == 3
