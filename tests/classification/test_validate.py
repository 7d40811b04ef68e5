"""validate.py."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scoring import CLASSES, CPU, classify, results, score

import mambavision
from checkout import ROOT
from engine.model import open_classifier
from engine.options import ThroughputOptions, ValidateOptions
from engine.throughput import compare
from engine.validate import jobs
from mambavision.errors import CheckpointError, DataError, OutputError, UserError
from small_models import SMALL


def test_scores_are_those_of_counting(digits, checkpoint, capsys):
    score("--data_dir", digits, "--checkpoint", checkpoint, "--batch-size", "4")
    result = results(capsys)
    classifier = open_classifier(
        ValidateOptions.parse(CPU).preprocessing, None, str(checkpoint), torch.device("cpu"), exif_default=False
    )
    right = 0
    for file in sorted(digits.glob("val/*/*.png")):
        image = Image.open(file).convert("RGB")
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        right += classifier.model(x).argmax().item() == CLASSES.index(file.parent.name)
    assert result["top1"] == pytest.approx(100 * right / 15, abs=1e-3)
    assert result["top1"] + result["top1_err"] == 100
    assert result["top5"] == 100
    expected = {"model": "mamba_vision_T", "img_size": 32, "checkpoint": str(checkpoint), "weights": "raw"}
    assert {key: result[key] for key in expected} == expected
    assert result["param_count"] == round(sum(each.numel() for each in classifier.model.parameters()) / 1e6, 2)


@pytest.mark.parametrize(
    "words",
    [
        ["--amp"],
        ["--amp", "--amp-dtype", "float16", "--channels-last"],
        ["--torchcompile", "aot_eager"],
        ["--img-size", "64", "--test-pool", "--crop-pct", "0.9", "--crop-mode", "squash"],
        ["--input-size", "3", "48", "40", "--interpolation", "bilinear", "--mean", "0", "--std", "1", "--gp", "max"],
        ["--use-train-size", "--no-prefetcher", "--exif-transpose", "--retry", "--log-freq", "1"],
    ],
    ids=" ".join,
)
def test_options_work(digits, checkpoint, capsys, words):
    score(digits, "--checkpoint", checkpoint, *words)
    assert np.isfinite(results(capsys)["loss"])


def test_averaged_weights(digits, checkpoint, tmp_path, capsys):
    score(digits, "--checkpoint", checkpoint)
    assert (
        "best.pth.tar: loaded the raw weights; the averaged ones are available with --use-ema"
        in capsys.readouterr().out
    )
    table = tmp_path / "table.csv"
    score(digits, "--checkpoint", checkpoint, "--use-ema", "--results-file", table)
    shown = capsys.readouterr().out
    assert "raw weights" not in shown
    result = json.loads(shown.split("--result\n")[1])
    assert result["weights"] == next(csv.DictReader(table.open()))["weights"] == "ema"
    assert result["top1"] == pytest.approx(100 / 3, abs=1e-3)  # all logits are 0
    assert result["loss"] == pytest.approx(np.log(3), abs=1e-3)


def test_files_of_other_programs_need_the_name_of_the_model(digits, tmp_path, capsys):
    """A file as VMamba's authors wrote it, whose averaged weights were left out."""
    model = mambavision.create_model("vmamba_tiny_s1l8", **SMALL["vmamba_tiny_s1l8"] | {"num_classes": 3})
    file = tmp_path / "ckpt_epoch_264.pth"
    mambavision.save_checkpoint({"model": model.state_dict(), "epoch": 264}, file)
    size = ["--model-kwargs", "dims=16", "depths=1,1,2,1", "--num-classes", "3", "--img-size", "32"]
    with pytest.raises(UserError, match="does not name its model; give it with --model"):
        score(digits, "--checkpoint", file, *size)
    words = [digits, "--checkpoint", file, "--model", "vmamba_tiny_s1l8", *size]
    score(*words)
    assert results(capsys)["model"] == "vmamba_tiny_s1l8"
    with pytest.raises(CheckpointError, match=r"264\.pth: has no averaged weights .*; load it without EMA"):
        score(*words, "--use-ema")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_many_checkpoints_are_ranked(digits, checkpoint, tmp_path, capsys, kind):
    for name in ("a.pth.tar", "b.pth", "notes.txt"):
        shutil.copy(checkpoint, tmp_path / name)
    table = tmp_path / "results" / f"table.{kind}"
    score(digits, "--checkpoint", tmp_path, "--results-file", table, "--results-format", kind)
    ranked = results(capsys)
    assert [row["checkpoint"] for row in ranked] == [str(tmp_path / "a.pth.tar"), str(tmp_path / "b.pth")]
    written = json.loads(table.read_text()) if kind == "json" else list(csv.DictReader(table.open()))
    assert [row["checkpoint"] for row in written] == [row["checkpoint"] for row in ranked]
    assert float(written[0]["top1"]) == ranked[0]["top1"]


def test_one_bad_checkpoint_of_many_is_recorded(digits, checkpoint, tmp_path, capsys):
    (tmp_path / "a.pth").write_text("no checkpoint")
    shutil.copy(checkpoint, tmp_path / "b.pth")
    mambavision.save_checkpoint({"x": torch.ones(1)}, tmp_path / "c.pth")
    table = tmp_path / "table.csv"
    score(digits, "--checkpoint", tmp_path, "--results-file", table)
    good, *bad = results(capsys)
    assert (good["checkpoint"], good["model"]) == (str(tmp_path / "b.pth"), "mamba_vision_T")
    assert [row["checkpoint"] for row in bad] == [str(tmp_path / "a.pth"), str(tmp_path / "c.pth")]
    assert "is not a checkpoint" in bad[0]["error"]
    written = list(csv.DictReader(table.open()))
    assert (written[0]["error"], written[1]["top1"]) == ("", "")
    (tmp_path / "b.pth").unlink()
    with pytest.raises(UserError, match=r"none of the 2 models could be scored; the last: .*c\.pth"):
        score(digits, "--checkpoint", tmp_path)


def test_classifiers_may_have_outputs_to_spare(digits, tmp_path, capsys):
    arguments = SMALL["mamba_vision_T"] | {"num_classes": 5}
    model = mambavision.create_model("mamba_vision_T", **arguments)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 3.0, 1.0, 0.0, 9.0])
    content = {"arch": "mamba_vision_T", "model_kwargs": arguments, "state_dict": model.state_dict()}
    mambavision.save_checkpoint(content | {"classes": CLASSES}, tmp_path / "five.pth")
    words = ["--checkpoint", tmp_path / "five.pth", "--img-size", "32"]
    score(digits, *words)
    assert results(capsys)["top1"] == 0
    classify(digits / "val", *words, "--out", tmp_path / "out")
    (row, *_) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [each["name"] for each in row["predictions"]][:3] == ["class 4", "digit 1", "digit 2"]


def test_grey_models_need_one_option_only(digits, tmp_path, capsys):
    model = mambavision.create_model("test_resnet", num_classes=3, in_chans=1)
    mambavision.save_checkpoint(model.state_dict(), tmp_path / "grey.pth")
    words = ["--checkpoint", tmp_path / "grey.pth", "--model", "test_resnet", "--num-classes", "3", "--in-chans", "1"]
    score(digits, *words)
    assert np.isfinite(results(capsys)["loss"])
    classify(digits / "val", *words, "--out", tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 15


def test_released_weights_may_be_named_needlessly(digits, checkpoint, capsys):
    score(digits, "--checkpoint", checkpoint, "--pretrained")
    assert "--pretrained has no effect" in capsys.readouterr().out


def test_many_models_can_be_named(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("mamba_vision_T\nmamba_vision_S\n")
    for given, expected in {
        "mamba_vision_L2*": ["mamba_vision_L2", "mamba_vision_L2_512_21k"],
        # those whose weights can be downloaded
        "all": [name for name in mambavision.list_models() if not name.startswith("segman")],
        str(names): ["mamba_vision_T", "mamba_vision_S"],
    }.items():
        assert list(jobs(ValidateOptions.parse(["--model", given]).model)) == [(name, "") for name in expected]
    with pytest.raises(UserError, match="matches none of"):
        list(jobs(ValidateOptions.parse(["--model", "vit*"]).model))


def test_labels_can_restrict_the_predictions(digits, tmp_path, capsys):
    arguments = SMALL["mamba_vision_T"] | {"num_classes": 5}
    content = {"arch": "mamba_vision_T", "model_kwargs": arguments}
    model = mambavision.create_model("mamba_vision_T", **arguments)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([9.0, 1.0, 8.0, 2.0, 3.0])
    mambavision.save_checkpoint(content | {"state_dict": model.state_dict()}, tmp_path / "five.pth")
    words = [digits, "--checkpoint", tmp_path / "five.pth", "--img-size", "32"]
    with pytest.raises(DataError, match="the data has 3 classes and the model predicts 5"):
        score(*words)
    (tmp_path / "labels.txt").write_text("1\n3\n4\n")
    score(*words, "--valid-labels", tmp_path / "labels.txt")
    assert results(capsys)["top1"] == pytest.approx(100 / 3, abs=1e-3)
    for text, message in {"7\n": "index 7 is outside", "one\n": "not a list of class indices"}.items():
        (tmp_path / "labels.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            score(*words, "--valid-labels", tmp_path / "labels.txt")


def test_real_labels_take_the_place_of_top1(digits, checkpoint, tmp_path, capsys, monkeypatch):
    """On 15 images that stand for ImageNet's 50 000."""
    renamed = tmp_path / "imagenet" / "val"
    for number, file in enumerate(sorted(digits.glob("val/*/*.png"))):
        target = renamed / file.parent.name / f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).convert("RGB").save(target)
    # Every class is right for the first five images, none for the next, and the rest do not count.
    (tmp_path / "real.json").write_text(json.dumps([[0, 1, 2]] * 5 + [[7]] * 5 + [[]] * 5))
    words = [renamed, "--checkpoint", checkpoint, "--real-labels", tmp_path / "real.json"]
    with pytest.raises(UserError, match="needs the 50000 ImageNet validation images"):
        score(*words)
    monkeypatch.setattr("engine.validate._IMAGENET_VALIDATION_IMAGES", 15)
    monkeypatch.setattr("timm.data.RealLabelsImagenet.__init__.__defaults__", (None, (1, 3)))
    monkeypatch.setattr("timm.data.RealLabelsImagenet.get_accuracy", _accuracy_of_available)
    score(*words)
    assert results(capsys)["top1"] == 50


def _accuracy_of_available(self, k):
    return float(np.mean(self.is_correct[min(k, 3)])) * 100


def test_wrong_requests_are_one_sentence(digits, checkpoint, tmp_path):
    for words, error, message in [
        ([digits], UserError, "nothing to score: give --checkpoint, or --model"),
        ([tmp_path / "none", "--checkpoint", checkpoint], DataError, "none: no such folder"),
        ([digits, "--data-dir", tmp_path, "--checkpoint", checkpoint], UserError, "two data folders"),
        ([digits, "--checkpoint", tmp_path], UserError, "contains no checkpoints"),
        ([digits, "--model", "mamba_vision"], UserError, "unknown model 'mamba_vision'. Did you mean"),
        ([digits, "--checkpoint", checkpoint, "--num-classes", "4"], CheckpointError, "not 4; leave out --num-classes"),
    ]:
        with pytest.raises(error, match=message):
            score(*words)


def test_unwritable_results_are_noticed_before_the_work(digits, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.validate.jobs", lambda args: pytest.fail("too late"))
    monkeypatch.setattr("engine.throughput._contestant", lambda *args: pytest.fail("too late"))
    for place in (tmp_path, checkpoint / "results", "/proc/none/results"):
        with pytest.raises(OutputError, match="cannot be written"):
            score(digits, "--checkpoint", checkpoint, "--results-file", place)
        with pytest.raises(OutputError, match="cannot be written"):
            compare(ThroughputOptions.parse(["--json", str(place)]))


def test_unreachable_weights_are_logged_once(run_program, digits, tmp_path):
    """The address refuses connections; without the waits between attempts."""
    program = tmp_path / "validate.py"
    program.write_text(
        f"""
import sys, time
sys.path.insert(0, {str(ROOT / "classification")!r})
time.sleep = lambda seconds: None
import validate
validate.main()
"""
    )
    places = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    words = ["--data-dir", digits, "--model", "mamba_vision_T", *CPU]
    result = run_program(program, *words, check=False, **places)
    assert result.returncode == 65
    assert (result.stdout + result.stderr).count("[Retry 1/") == 1
    assert "could not be downloaded" in result.stderr.splitlines()[-1]


def test_other_classes_than_the_checkpoint_are_listed(digits, checkpoint, tmp_path):
    data = shutil.copytree(digits, tmp_path / "data")
    (data / "val" / "digit 1").rename(data / "val" / "digit 7")
    with pytest.raises(DataError, match=r"lacks 'digit 1' and has the unknown 'digit 7'"):
        score(data, "--checkpoint", checkpoint)


def test_programs_end_with_one_sentence_and_a_status(run_program, digits, tmp_path):
    result = run_program("classification/validate.py", digits, "--checkpoint", "none.pth", *CPU, check=False)
    assert result.returncode == 65
    assert result.stderr.splitlines()[-1].startswith("error: none.pth: no such file")
    assert "Traceback" not in result.stderr
    data = shutil.copytree(digits, tmp_path / "data")
    (data / "train" / "digit 0" / "00.png").write_text("no image")
    words = ["--data-dir", data, "--workers", "1", "--batch-size", "10", "--model-kwargs", "dim=16", "in_dim=8"]
    result = run_program("classification/train.py", *words, "--input-size", "3", "32", "32", *CPU, check=False)
    assert result.returncode == 65
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")  # though the error was found in a worker process
    assert "00.png: cannot be decoded (not an image)" in last
    assert "Traceback" not in result.stderr
