"""Outlines of checkpoints: numbers and texts, without tensors, and without executing anything."""

import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from mambavision.checkpoint import read_outline


def test_numbers_and_texts_are_there(tmp_path):
    path = tmp_path / "checkpoint.pth"
    meta = {"epoch": 3, "iter": 70_000, "name": "größer", "big": 2**70}
    many = {f"layer.{number}": torch.zeros(1) for number in range(1500)}  # pickled in several portions
    torch.save({"meta": meta, "rate": 0.5, "hub": OrderedDict(started=1.5), "state_dict": many, 5: "five"}, path)
    found = read_outline(path)
    assert (found["meta"], found["rate"], found["hub"]) == (meta, 0.5, {"started": 1.5})
    assert found["state_dict"].keys() == many.keys()
    assert all(tensor.is_meta and tensor.shape == (1,) for tensor in found["state_dict"].values())


def test_other_values_do_not_disturb(tmp_path):
    path = tmp_path / "checkpoint.pth"
    values = [None, True, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], [1, 2], {1, 2}, b"x", {}, torch.ones(2)]
    torch.save({"values": values, "epoch": 7, "shared": [values, values]}, path)
    assert read_outline(path)["epoch"] == 7


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_executed(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 1, "trap": Runs(tmp_path / "made")}, path)
    assert read_outline(path) is None
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "pickled", [b"", b"\x80\x02", b"\x80\x02u.", b"\x80\x02h\x05.", b"\x80\x02}K\x01s.", b"no", b"."]
)
def test_damage_gives_nothing(tmp_path, pickled):
    path = tmp_path / "checkpoint.pth"
    assert read_outline(path) is None
    path.write_bytes(pickled)
    assert read_outline(path) is None
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    assert read_outline(path) is None


def test_compressed_files_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"epoch": 1}, 2))
    assert read_outline(tmp_path / "bomb.pth") is None
