"""What torch.save, timm, the originals and MMEngine write, read as plain values."""

import argparse
import collections
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from mambavision.checkpoint import read_checkpoint

WEIGHTS = {
    "floats": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "a part": torch.arange(10)[3:7],
    "strided": torch.arange(10.0)[::3],
    "a scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(2, dtype=torch.float16),
    "bfloat16": torch.ones(2, dtype=torch.bfloat16),
    "double": torch.ones(2, dtype=torch.float64),
    "bool": torch.tensor([True, False]),
    "bytes": torch.tensor([1, 255], dtype=torch.uint8),
    "complex": torch.tensor([1 + 2j]),
    "8-bit floats": torch.ones(2).to(torch.float8_e4m3fn),
    "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
}
SETTINGS = {
    "namespace": (
        argparse.Namespace(lr=0.1, out=pathlib.Path("a", "b"), names=["x"]),
        {"lr": 0.1, "out": "a/b", "names": ["x"]},
    ),
    "a windows path": (pathlib.PureWindowsPath("c:\\x", "y"), "c:\\x\\y"),
    "numbers of NumPy": ([np.float64(82.3), np.int64(-3), np.bool_(True), np.float32(0.5)], [82.3, -3, True, 0.5]),
    "a large number": (2**70, 2**70),
    "a set": ({1}, [1]),
    "milestones": (collections.Counter([8, 11]), collections.Counter({8: 1, 11: 1})),
    "bytes": ([b"", b"abc\xff"], [b"", b"abc\xff"]),
    "a shape": (torch.Size([2, 3]), (2, 3)),
    "a device": (torch.device("cuda", 1), "cuda:1"),
    "a dtype": (torch.bfloat16, "torch.bfloat16"),
    "tuples": (((1, 2), ("a", None, True)), ((1, 2), ("a", None, True))),
    "not finite": ([float("inf")], [float("inf")]),
}
ARRAYS = {
    "in rows": np.arange(6.0).reshape(2, 3),
    "in columns": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    "of the other byte order": np.arange(3, dtype=">f4"),
    "empty": np.zeros((0, 3), np.float16),
}


@pytest.fixture(params=[True, False], ids=["archive", "legacy"])
def saved(request, tmp_path):
    """Save a value and read it again."""

    def again(value):
        torch.save({"value": value}, tmp_path / "file.pth", _use_new_zipfile_serialization=request.param)
        return read_checkpoint(tmp_path / "file.pth")["value"]

    return again


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind, saved):
    value = saved(WEIGHTS[kind])
    assert value.dtype == WEIGHTS[kind].dtype
    assert value.stride() == WEIGHTS[kind].stride()
    assert value.equal(WEIGHTS[kind])


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings(kind, saved):
    given, expected = SETTINGS[kind]
    value = saved(given)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_numpy(kind, saved):
    value = saved(ARRAYS[kind])
    assert isinstance(value, torch.Tensor)
    np.testing.assert_array_equal(value.numpy(), ARRAYS[kind])


def test_parameters_and_tensors_with_attributes(saved):
    parameter, tensor = nn.Parameter(torch.ones(2)), torch.ones(2)
    parameter._no_weight_decay = tensor.note = True
    for value in (nn.Parameter(torch.ones(2)), parameter, tensor):
        read = saved(value)
        assert type(read) is torch.Tensor
        assert read.equal(torch.ones(2))
        assert not read.requires_grad
        assert not hasattr(read, "_no_weight_decay")
        assert not hasattr(read, "note")


def test_versions_of_modules_and_shared_data_are_kept(saved):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weights = model.state_dict()
    weights["tied"] = weights["0.weight"]
    read = saved(weights)
    assert read._metadata == weights._metadata
    assert read["tied"] is not None
    assert read["tied"].data_ptr() == read["0.weight"].data_ptr()


def test_numpy_of_either_major_version(tmp_path):
    """They name their functions differently."""
    path = tmp_path / "file.pth"
    torch.save({"value": np.float64(3), "array": np.arange(3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"numpy._core.multiarray") == 2
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    read = read_checkpoint(path)
    assert (read["value"], read["array"].tolist()) == (3.0, [0, 1, 2])


def test_optimizers_and_random_states(saved):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    read = saved(optimizer.state_dict())
    again = torch.optim.AdamW(model.parameters())
    again.load_state_dict(read)
    assert str(again.state_dict()) == str(optimizer.state_dict())
