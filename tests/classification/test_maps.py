"""receptive_field.py and activation_map.py."""

import json

import numpy as np
import pytest
from PIL import Image

import mambavision
from engine.activation_map import draw_activation_maps
from engine.options import ActivationMapOptions, ReceptiveFieldOptions
from engine.receptive_field import draw_receptive_fields
from mambavision.errors import CheckpointError, DataError, UserError
from parity import fill_
from small_models import SMALL


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth.tar"
    model = fill_(mambavision.create_model("vmamba_tiny_s1l8", **SMALL["vmamba_tiny_s1l8"]))
    content = {
        "arch": "vmamba_tiny_s1l8",
        "model_kwargs": SMALL["vmamba_tiny_s1l8"],
        "state_dict": model.state_dict(),
        "data_config": {"input_size": (3, 64, 64), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    }
    mambavision.save_checkpoint(content, path)
    return str(path)


def test_receptive_fields_are_drawn_side_by_side(digits, checkpoint, tmp_path, capsys):
    words = [f"{digits}/val", "--checkpoint", checkpoint, checkpoint, "--count", "3", "--shares", "0.5", "0.9999"]
    draw_receptive_fields(ReceptiveFieldOptions.parse([*words, "--out", str(tmp_path), "--device", "cpu"]))
    assert "more than 50 % within" in capsys.readouterr().out
    rows = json.loads((tmp_path / "receptive_field.json").read_text())
    maps = np.load(tmp_path / "receptive_field.npz")
    names = [f"vmamba_tiny_s1l8{number} {kind}" for number in ("", " (2)") for kind in ("initial", "trained")]
    assert [row["map"] for row in rows] == list(maps) == names
    before, after, again_before, again_after = maps.values()
    assert np.array_equal(before, again_before)  # the seed's
    assert np.array_equal(after, again_after)
    assert not np.allclose(before, after)
    for row in rows:
        assert (row["images"], row["skipped"], row["input_size"]) == (3, 0, [3, 64, 64])
        half, nearly_all = row["squares"]
        assert maps[row["map"]].shape == (64, 64)
        assert half["area"] == (half["side"] / 64) ** 2
        assert nearly_all == {"share": 0.9999, "side": None, "area": None}
    with Image.open(tmp_path / "receptive_field.png") as picture:
        assert min(picture.size) > 700


def test_receptive_fields_of_models_have_one_size(digits, tmp_path):
    words = [f"{digits}/val", "--model", "test_resnet", "test_vit", "--weights", "initial", "--count", "1"]
    draw_receptive_fields(ReceptiveFieldOptions.parse([*words, "--out", str(tmp_path), "--device", "cpu"]))
    sizes = [row["input_size"] for row in json.loads((tmp_path / "receptive_field.json").read_text())]
    assert sizes[0] == sizes[1]


def test_activation_maps_are_drawn_for_points(digits, checkpoint, tmp_path):
    file = sorted((digits / "val").rglob("*.png"))[0]
    words = [str(file), "--checkpoint", checkpoint, "--points", "0.1,0.9", "0.5,0.5", "--input-size", "3", "64", "96"]
    draw_activation_maps(ActivationMapOptions.parse([*words, "--out", str(tmp_path), "--device", "cpu"]))
    first, second = json.loads((tmp_path / "activation_maps.json").read_text())
    assert (first["point"], first["cell"], second["cell"]) == ([0.1, 0.9], [3, 0], [2, 3])
    assert first["blocks"] == ["layers.2.blocks.1"]
    maps = np.load(tmp_path / first["maps"])
    assert len(maps) == 18
    assert maps["nall_norm_ww"].shape == (4, 6)
    assert maps["a0_norm_ww"][3, 1:].tolist() == [0] * 5  # the route has not read them yet
    with Image.open(tmp_path / second["picture"]) as picture:
        assert picture.size[0] > 1000


def test_chosen_maps_and_rollout(digits, checkpoint, tmp_path):
    file = sorted((digits / "val").rglob("*.png"))[0]
    words = [str(file), "--checkpoint", checkpoint, "--out", str(tmp_path), "--device", "cpu", "--maps", "all_norm_CB"]
    draw_activation_maps(ActivationMapOptions.parse([*words, "ao1_norm_CB", "--rollout"]))
    (row,) = json.loads((tmp_path / "activation_maps.json").read_text())
    assert row["blocks"] == ["layers.2.blocks.0", "layers.2.blocks.1"]
    maps = np.load(tmp_path / row["maps"])
    assert list(maps) == ["all_norm_CB", "ao1_norm_CB"]
    assert maps["all_norm_CB"].sum() == pytest.approx(1)
    with pytest.raises(UserError, match="--rollout needs maps without negative values"):
        draw_activation_maps(ActivationMapOptions.parse([*words, "a0_CB", "--rollout"]))


def test_a_stage_of_scans_and_attention_is_rolled_out(digits, tmp_path):
    model = mambavision.create_model("mamba_vision_T", **SMALL["mamba_vision_T"])
    weights = tmp_path / "weights.pth"
    mambavision.save_checkpoint({"arch": "mamba_vision_T", "state_dict": model.state_dict()}, weights)
    kwargs = [f"{key}={value}" for key, value in SMALL["mamba_vision_T"].items() if key != "num_classes"]
    words = [str(digits / "val" / "digit 0" / "20.png"), "--checkpoint", str(weights), "--num-classes", "10"]
    words += ["--model-kwargs", *kwargs, "--size", "64", "--out", str(tmp_path), "--device", "cpu"]
    draw_activation_maps(ActivationMapOptions.parse([*words, "--rollout"]))
    (row,) = json.loads((tmp_path / "activation_maps.json").read_text())
    assert list(np.load(tmp_path / row["maps"])) == ["a0_norm_CB", "a0_norm_CwBw", "a0_norm_ww"]
    draw_activation_maps(ActivationMapOptions.parse(words))
    assert list(np.load(tmp_path / row["maps"])) == ["softmax"]
    with pytest.raises(UserError, match="has softmax attention, which has a single map: leave out --maps"):
        draw_activation_maps(ActivationMapOptions.parse([*words, "--maps", "a0_CB"]))


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        (ActivationMapOptions.parse, ["--points", "1.5,0.5"], "must be X,Y, each from 0 to 1, got '1.5,0.5'"),
        (ActivationMapOptions.parse, ["--points", "middle"], "must be X,Y"),
        (ReceptiveFieldOptions.parse, ["--shares", "1"], "must be between 0 and 1, got '1'"),
        (ReceptiveFieldOptions.parse, ["--weights", "best"], "invalid choice: 'best'"),
    ],
)
def test_wrong_options_are_one_sentence(capsys, options, words, message):
    with pytest.raises(SystemExit):
        options(["photo.jpg", *words])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_impossible_requests_write_nothing(digits, checkpoint, tmp_path):
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    for draw, words, kind, message in [
        (draw_receptive_fields, ReceptiveFieldOptions.parse(["nowhere", *out]), DataError, "nowhere: no image there"),
        (
            draw_receptive_fields,
            ReceptiveFieldOptions.parse([str(digits), *out]),
            UserError,
            "no model: give --checkpoint",
        ),
        (
            draw_receptive_fields,
            ReceptiveFieldOptions.parse([str(digits), *out, "--model", "test_vit", "--checkpoint", "a", "b"]),
            UserError,
            "1 models and 2 checkpoints",
        ),
        (
            draw_receptive_fields,
            ReceptiveFieldOptions.parse([str(digits), *out, "--checkpoint", checkpoint, "--stage", "7"]),
            UserError,
            "has no stage 7",
        ),
        (
            draw_activation_maps,
            ActivationMapOptions.parse([str(digits), *out, "--checkpoint", checkpoint, "--maps", "a0_best"]),
            UserError,
            "unknown map 'a0_best'",
        ),
        (
            draw_activation_maps,
            ActivationMapOptions.parse([str(digits), *out, "--checkpoint", "none.pth"]),
            CheckpointError,
            "none.pth: no such file",
        ),
        (
            draw_activation_maps,
            ActivationMapOptions.parse([str(digits), *out, "--checkpoint", checkpoint, "--block", "2"]),
            UserError,
            "has no block 2",
        ),
    ]:
        with pytest.raises(kind, match=message):
            draw(words)
    assert not (tmp_path / "out").exists()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"broken\.png: cannot be decoded"):
        draw_activation_maps(ActivationMapOptions.parse([str(broken), *out, "--checkpoint", checkpoint]))


@pytest.mark.parametrize("program", ["receptive_field", "activation_map"])
def test_programs_end_with_one_sentence(run_program, program):
    failed = run_program(f"classification/{program}.py", "nowhere", "--model", "vmamba_tiny_s1l8", check=False)
    assert (
        failed.stderr == "error: nowhere: no image there; give image files, folders of images, or a quoted pattern.\n"
    )
