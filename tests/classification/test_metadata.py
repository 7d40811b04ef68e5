"""What checkpoints say beside their weights, where it cannot be true."""

import json
import shutil

import pytest

import mambavision
from engine.options import PredictOptions, ValidateOptions
from engine.predict import predict
from engine.validate import validate
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import CheckpointError, NonFiniteError
from small_models import SMALL

NAME = "mamba_vision_T"


@pytest.fixture(scope="module")
def content():
    arguments = SMALL[NAME] | {"num_classes": 3}
    return {
        "arch": NAME,
        "model_kwargs": arguments,
        "state_dict": mambavision.create_model(NAME, **arguments).state_dict(),
        "data_config": {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3},
        "classes": ["digit 0", "digit 1", "digit 2"],
    }


@pytest.fixture
def score(content, digits, tmp_path):
    """Score a checkpoint with other metadata."""

    def start(*words, **changes):
        mambavision.save_checkpoint(content | changes, tmp_path / "file.pth")
        given = ["--data-dir", digits, "--checkpoint", tmp_path / "file.pth", "--device", "cpu", "--workers", "0"]
        validate(ValidateOptions.parse([*map(str, given), *words]))

    return start


WRONG = {
    "arch": [3, "", "hf-hub:timm/resnet18", "local-dir:/etc", ["mamba_vision_T"], "no_such_model", "x" * 10_000],
    "model_kwargs": [
        [1],
        "dim=3",
        {1: 2},
        {"pretrained": True},
        {"pretrained_cfg_overlay": {"file": "elsewhere.pth"}},
        {"checkpoint_path": "elsewhere.pth"},
        {"pretrained_cfg": "hf-hub:timm/resnet18"},
        {"dim": float("nan")},
        {"dim": "large"},
        {"dim": -1},
        {"dim": 10**9},
        {"num_classes": 10**12},
        {"depths": (10**5, 1, 1, 1)},
        {"depths": None},
        {"num_heads": (0, 0, 0, 0)},
        {"window_size": ()},
        {"unknown": 1},
    ],
    "data_config": [
        [1],
        {"input_size": (3, 0, 0)},
        {"input_size": (3, 10**6, 10**6)},
        {"input_size": "large"},
        {"input_size": (3, 32)},
        {"mean": "grey"},
        {"mean": (float("nan"),) * 3},
        {"mean": (0.5, 0.5)},
        {"std": (0.0,) * 3},
        {"std": ()},
        {"crop_pct": -1},
        {"crop_pct": "whole"},
        {"crop_mode": "cut"},
        {"interpolation": "smooth"},
    ],
    "classes": ["abc", 3, [1, 2, 3], ["a", "a", "b"], [], ["a", "", "b"], {"a": 0}],
    "exif_transpose": ["yes", 1],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_impossible_metadata_are_said(key, value, score):
    with pytest.raises(CheckpointError, match=r"file\.pth: ") as refused:
        score(**{key: value})
    assert refused.value.exit_status == 65
    assert "\n" not in str(refused.value)


def test_true_metadata_are_used(score, capsys):
    score()
    assert json.loads(capsys.readouterr().out.split("--result\n")[1])["img_size"] == 32


WRONG_TRAINING = {
    "epoch": [-1, "1", 1.5, True, 10**30, [1]],
    "next_batch": [-1, "1"],
    "args": ["lr=1", [1]],
    "batching": [3],
    "optimizer": [
        3,
        {},
        {"state": [], "param_groups": []},
        {"state": {}, "param_groups": "abc"},
        {"state": {0: 3}, "param_groups": [{}]},
        {"state": {}, "param_groups": [{"params": [0, 1]}]},
    ],
    "checkpoints": [
        3,
        {},
        {"best": 3, "kept": []},
        {"best": None, "kept": [("a", 1)]},
        {"best": None, "kept": [(-1, 1.0)]},
    ],
    "processes": [3, [{}], [None], [{"random": {}, "buffers": {}, "epoch_so_far": {}}]],
}


@pytest.fixture(scope="module")
def last(trained):
    """The last checkpoint of a short training."""
    return trained("--epochs", "1") / "last.pth.tar"


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_TRAINING.items() for value in values])
def test_impossible_states_of_training_are_said(key, value, last, train, tmp_path):
    mambavision.save_checkpoint(read_checkpoint(last) | {key: value}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"file\.pth: ") as refused:
        train("--resume", tmp_path / "file.pth", "--epochs", "3")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "output").exists()


# Weights


def test_weights_that_are_not_finite_are_refused(content, score):
    for value in (float("nan"), float("inf")):
        weights = {key: each.clone() for key, each in content["state_dict"].items()}
        weights["norm.weight"][0] = value
        with pytest.raises(CheckpointError, match=r"1 of its weights are not finite \(norm\.weight\)"):
            score(state_dict=weights)


def test_outputs_that_are_not_finite_are_said(content, score, digits, tmp_path, capsys):
    """Finite weights can overflow."""
    weights = {key: each.clone() for key, each in content["state_dict"].items()}
    weights["norm.weight"].fill_(1e30)
    weights["head.weight"].normal_().mul_(1e30)
    with pytest.raises(NonFiniteError, match=f"{NAME}: its outputs are not finite") as refused:
        score(state_dict=weights)
    assert refused.value.exit_status == 65
    assert "--result" not in capsys.readouterr().out
    out = tmp_path / "out"
    words = [digits / "val", "--checkpoint", tmp_path / "file.pth", "--out", out, "--device", "cpu"]
    with pytest.raises(NonFiniteError, match="outputs are not finite"):
        predict(PredictOptions.parse(list(map(str, words))))
    assert not out.exists()


def test_results_name_files_and_classes_harmlessly(content, digits, tmp_path, capsys):
    names = ["\x1b[2Jclear\n$", "two\nlines", "=cmd|' /C calc'!A0"]  # one of them is on the contact sheet
    mambavision.save_checkpoint(content | {"classes": names}, tmp_path / "file.pth")
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"latin-\xe9.png", b"new\nline.png", "naïve.png".encode(), b"$a_{b$.png"):
        shutil.copy(digits / "val" / "digit 0" / "20.png", bytes(folder) + b"/" + name)
    out = folder / "out"
    words = [folder, "--checkpoint", tmp_path / "file.pth", "--out", out, "--device", "cpu"]
    for _ in range(2):  # the second time, there is a contact sheet below the inputs
        predict(PredictOptions.parse(list(map(str, words))))
        printed = capsys.readouterr().out
        written = (out / "predictions.txt").read_text(encoding="utf-8")
        assert len(json.loads((out / "predictions.json").read_text(encoding="utf-8"))) == 4
        assert written in printed
    for text in (written, printed):
        assert "\x1b" not in text
        assert r"latin-\xe9.png" in text
        assert r"new\nline.png" in text
    assert "naïve.png" in written
