"""throughput.py."""

import json

import pytest
import torch

import mambavision
from engine import throughput
from engine.options import ThroughputOptions
from engine.throughput import compare

CPU = ["--device", "cpu"]


@pytest.mark.parametrize(
    "words",
    [["mamba_vision_T", "test_resnet"], ["test_vit2", "test_resnet", "--train", "--amp", "--channel_last"]],
    ids=["inference", "training"],
)
def test_models_are_timed_side_by_side(tmp_path, capsys, words):
    options = ["--resolution", "64", "--bs", "2", "--rounds", "3", "--iterations", "1", "--warmup", "1"]
    options += ["--json", str(tmp_path / "speed.json"), *CPU, "--model", *words]
    compare(ThroughputOptions.parse(options))
    shown = capsys.readouterr().out
    assert words[0] in shown
    assert "images/s" in shown
    report = json.loads((tmp_path / "speed.json").read_text())
    first, second = report["results"]
    assert [first["model"], second["model"]] == words[:2]
    assert first["ratio"] == 1
    assert min(first["images_per_second"], second["images_per_second"], second["ratio"]) > 0
    assert first["latency_ms"] == pytest.approx(2000 / first["images_per_second"])
    assert first["params_m"] == pytest.approx(sum(each.numel() for each in timm_model(words[0]).parameters()) / 1e6)
    assert first["memory_mib"] is None or first["memory_mib"] >= 0
    assert report["mode"] == ("training" if "--train" in words else "inference")


def test_models_of_other_channels_are_timed(tmp_path):
    options = [
        "--model",
        "test_resnet",
        "--model-kwargs",
        "in_chans=1",
        "--bs",
        "1",
        "--rounds",
        "1",
        "--iterations",
        "1",
    ]
    compare(ThroughputOptions.parse([*options, "--resolution", "32", "--json", str(tmp_path / "speed.json"), *CPU]))
    assert json.loads((tmp_path / "speed.json").read_text())["results"][0]["input_size"] == [1, 32, 32]


def timm_model(name):
    with torch.device("meta"):
        return mambavision.create_model(name)


QUICK = ["--rounds", "1", "--iterations", "1", "--warmup", "1", *CPU]


def test_sizes_can_be_swept(tmp_path, capsys):
    """By the originals' names of the flags; also for a model that is made for images of one size."""
    report = tmp_path / "speed.json"
    options = ["--model", "test_vit", "test_resnet", "--size", "32", "64", "--data_path", "imagenet", "--bs", "1"]
    compare(ThroughputOptions.parse([*options, "--json", str(report), *QUICK]))
    assert "--data-path is not needed" in capsys.readouterr().err
    rows = json.loads(report.read_text())["results"]
    assert [(row["model"], row["input_size"][1]) for row in rows] == [
        ("test_vit", 32),
        ("test_vit", 64),
        ("test_resnet", 32),
        ("test_resnet", 64),
    ]
    assert rows[1]["gmacs"] > 3 * rows[0]["gmacs"]


def test_batches_shrink_until_they_fit(tmp_path, monkeypatch, caplog):
    original = throughput._inference_run

    def run_with_little_memory(forward, images, autocast):
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(forward, images, autocast)

    monkeypatch.setattr(throughput, "_inference_run", run_with_little_memory)
    options = ["--model", "test_resnet", "--resolution", "32", "--bs", "13", "--json", str(tmp_path / "speed.json")]
    most = 3
    compare(ThroughputOptions.parse([*options, *QUICK]))
    (row,) = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert row["batch_size"] == 3
    assert row["images_per_second"] == pytest.approx(3000 / row["latency_ms"])
    assert "test_resnet: out of memory with a batch of 13; trying 6" in caplog.text
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        compare(ThroughputOptions.parse([*options, *QUICK]))


def test_ratio_is_of_images(tmp_path):
    """Of which batches that were halved have fewer."""
    first, second = (
        throughput._Contestant("any", (3, 32, 32), batch, throughput.Complexity(0, 0, 0, 0, 0), print)
        for batch in (8, 4)
    )
    seconds = [[1.0, 1.0], [2.0, 2.0]]
    assert throughput._timing([first, second], 1, seconds).ratio == 0.5
