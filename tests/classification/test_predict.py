"""predict.py."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from scoring import CLASSES, classify

import mambavision
from engine import contact_sheet
from engine.acceleration import compile_arguments
from engine.model import open_classifier
from engine.options import PredictOptions, TrainOptions, ValidateOptions
from engine.predict import find_images
from mambavision.errors import DataError, OutputError, UserError
from small_models import SMALL
from small_runs import flat


def test_predictions_in_three_forms(digits, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    classify(digits / "val", "--checkpoint", checkpoint, "--out", out, "--topk", "2", "--batch-size", "4")
    rows = json.loads((out / "predictions.json").read_text())
    assert len(rows) == 15
    for row in rows:
        first, second = row["predictions"]
        assert first["probability"] >= second["probability"]
        assert first["name"] == CLASSES[first["index"]]
    text = (out / "predictions.txt").read_text()
    assert text in capsys.readouterr().out
    assert text.count("%") == 30
    sheet = np.asarray(Image.open(out / "contact_sheet.png"))
    right = sum(row["predictions"][0]["name"] == row["file"].split("/")[-2] for row in rows)
    frames = {"right": (46, 160, 67), "wrong": (207, 34, 46)}
    drawn = {name: (sheet == colour).all(-1).sum() / (112**2 - 106**2) for name, colour in frames.items()}
    assert drawn == {"right": right, "wrong": 15 - right}


def test_predictions_can_be_compiled(digits, checkpoint, tmp_path, monkeypatch):
    compiled = []
    compile_model = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kwargs: compiled.append(kwargs) or compile_model(*args, **kwargs)
    )
    classify(digits / "val", "--checkpoint", checkpoint, "--out", tmp_path / "out", "--torchcompile", "eager")
    assert compiled == [{"backend": "eager"}]


def compiled_with(options):
    found = flat(options)
    return compile_arguments(found.torchcompile, found.torchcompile_mode)


def test_modes_are_of_inductor():
    reduced = ["--torchcompile-mode", "reduce-overhead"]
    expected = {"backend": "inductor", "mode": "reduce-overhead"}
    assert compiled_with(ValidateOptions.parse(reduced)) == compiled_with(TrainOptions.parse(reduced)) == expected
    assert compiled_with(ValidateOptions.parse(["--torchcompile"])) == {"backend": "inductor"}
    with pytest.raises(UserError, match="--torchcompile-mode is for inductor, but --torchcompile names eager"):
        compiled_with(ValidateOptions.parse(["--torchcompile", "eager", *reduced]))


def test_inputs_are_files_folders_and_patterns(digits):
    one = digits / "val" / "digit 0" / "20.png"
    assert find_images([str(one)]) == [one]
    assert len(find_images([str(digits / "val"), str(one)])) == 15
    assert len(find_images([str(digits / "**" / "0*.png")])) == 30
    with pytest.raises(DataError, match="no image there"):
        find_images([str(digits / "*.bmp")])


def test_unusual_images_are_classified(checkpoint, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    grey = Image.linear_gradient("L")
    for name, image in {
        "1x1.png": grey.resize((1, 1)),
        "31x33.png": grey.resize((31, 33)),
        "wide.png": grey.resize((1024, 16)),
        "cmyk.jpg": grey.convert("RGB").convert("CMYK"),
        "16bit.png": Image.fromarray(np.full((20, 20), 40_000, np.uint16)),
        "palette.gif": grey.convert("P"),
    }.items():
        image.save(folder / name)
    classify(folder, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 6


def test_rotated_photographs_follow_the_checkpoint(checkpoint):
    options = PredictOptions.parse(["x"]).preprocessing
    assert not open_classifier(options, None, str(checkpoint), torch.device("cpu"), exif_default=True).exif_transpose
    options = PredictOptions.parse(["x", "--exif-transpose"]).preprocessing
    assert open_classifier(options, None, str(checkpoint), torch.device("cpu"), exif_default=True).exif_transpose


def test_class_names_from_a_file_or_imagenet(digits, checkpoint, tmp_path):
    (tmp_path / "names.txt").write_text("zero\none\ntwo\n")
    one = digits / "val" / "digit 0" / "20.png"
    words = [one, "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    classify(*words, "--class-names", tmp_path / "names.txt")
    assert "zero" in (tmp_path / "out" / "predictions.txt").read_text()
    (tmp_path / "names.txt").write_text("zero\n")
    with pytest.raises(DataError, match="has 1 names, the model 3 classes"):
        classify(*words, "--class-names", tmp_path / "names.txt")
    arguments = SMALL["mamba_vision_T"] | {"num_classes": 1000}
    model = mambavision.create_model("mamba_vision_T", **arguments)
    content = {"arch": "mamba_vision_T", "model_kwargs": arguments, "state_dict": model.state_dict()}
    mambavision.save_checkpoint(content, tmp_path / "imagenet.pth")
    classify(one, "--checkpoint", tmp_path / "imagenet.pth", "--out", tmp_path / "out", "--topk", "1000")
    assert "tabby" in (tmp_path / "out" / "predictions.txt").read_text()


def test_broken_images_are_named_or_skipped(digits, checkpoint, tmp_path, capsys):
    data = shutil.copytree(digits / "val", tmp_path / "val")
    (data / "digit 1" / "20.png").write_bytes(b"")
    words = [data, "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    with pytest.raises(DataError, match=r"digit 1/20\.png: cannot be decoded \(not an image\)"):
        classify(*words)
    assert not (tmp_path / "out").exists()
    classify(*words, "--skip-corrupt")
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 14
    assert "1 of 15 images could not be decoded" in capsys.readouterr().out


def test_impossible_predictions_create_nothing(digits, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file" / "out"), "/proc/out"):
        with pytest.raises(OutputError, match=rf"{place}/predictions\.txt: cannot be written .*choose another place"):
            classify(digits, "--checkpoint", "none.pth", "--out", place)
    with pytest.raises(UserError, match="no model: give --checkpoint"):
        classify(digits)


def test_many_images_get_numbered_sheets(digits, checkpoint, tmp_path):
    classify(digits, "--checkpoint", checkpoint, "--out", tmp_path, "--sheet-limit", "70")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["contact_sheet_1.png", "contact_sheet_2.png"]


@pytest.mark.parametrize(
    ("guess", "probability", "truth", "caption"),
    [
        ("3", 0.494, "3", ["3  49 %"]),
        ("3", 0.494, "8", ["3  49 % (is 8)"]),
        ("digit 3", 0.494, "digit 8", ["digit 3  49 %", "(is digit 8)"]),
        ("tabby, tabby cat", 1.0, None, ["tabby  100 %"]),
    ],
)
def test_captions_tell_guess_probability_and_truth(guess, probability, truth, caption):
    tile = contact_sheet.Tile(Image.new("RGB", (1, 1)), guess, probability, truth)
    assert contact_sheet._caption(tile, ImageFont.load_default(12)) == caption


def test_long_class_names_leave_room_for_the_rest():
    tile = contact_sheet.Tile(Image.new("RGB", (1, 1)), "American Staffordshire terrier", 1.0, "German shepherd dog")
    first, second = contact_sheet._caption(tile, ImageFont.load_default(12))
    assert first.startswith("American")
    assert first.endswith("…  100 %")
    assert second.startswith("(is German")
    assert second.endswith("…)")
