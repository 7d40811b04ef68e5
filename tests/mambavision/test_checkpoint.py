"""Reading and writing weight files."""

import argparse
import collections
import errno
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import mambavision
from mambavision.checkpoint import load_pretrained, load_weights, read_checkpoint
from mambavision.errors import CheckpointError, OutputError
from mambavision.files import check_writable, replacing
from small_models import SMALL

NAME = "mamba_vision_T"


def small(**kwargs):
    return mambavision.create_model(NAME, **{**SMALL[NAME], **kwargs})


@pytest.fixture
def source():
    return small()


def same(model, source):
    return all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


# Every container

CONTAINERS = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"epoch": 3, "state_dict": weights, "state_dict_ema": {"x": torch.ones(1)}},
    "model": lambda weights: {"model": weights, "optimizer": {"state": {}}},
    "state_dict wins over model": lambda weights: {"model": {"x": torch.ones(1)}, "state_dict": weights},
    "module. prefix": lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
    "hub's model. prefix": lambda weights: {f"model.{key}": value for key, value in weights.items()},
    "compiled, wrapped": lambda weights: {
        "model": {f"module._orig_mod.{key}": value for key, value in weights.items()}
    },
    "encoder. with a decoder": lambda weights: {
        "state_dict": {"decoder.x": torch.ones(1), **{f"encoder.{key}": value for key, value in weights.items()}}
    },
    "encoder. beside a head of its own": lambda weights: {
        "state_dict": {**{f"encoder.{key}": value for key, value in weights.items()}, "head.weight": torch.ones(1)}
    },
    "training checkpoint": lambda weights: {
        "epoch": 309,
        "arch": NAME,
        "state_dict": collections.OrderedDict(weights),
        "optimizer": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(model=NAME, lr=0.005, output=Path("runs")),
        "metric": np.float64(82.3),
        "history": np.arange(3),
        "version": 2,
    },
    "without batch counters": lambda weights: {
        key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")
    },
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_loads_strictly(container, source, tmp_path):
    path = tmp_path / "weights.pth.tar"
    torch.save(CONTAINERS[container](source.state_dict()), path)
    model = small()
    report = mambavision.load_checkpoint(model, path)
    assert same(model, source)
    assert (report.missing, report.unexpected, report.reshaped) == ((), (), ())


def test_safetensors_load_and_save(source, tmp_path):
    path = tmp_path / "model.safetensors"
    mambavision.save_checkpoint(source.state_dict(), path)
    assert safetensors.torch.load_file(path).keys() == source.state_dict().keys()
    model = small()
    mambavision.load_checkpoint(model, path)
    assert same(model, source)
    assert same(mambavision.create_model(NAME, checkpoint_path=path, **SMALL[NAME]), source)


def test_averaged_weights_on_request(source, tmp_path):
    path = tmp_path / "weights.pth"
    mambavision.save_checkpoint({"state_dict": small().state_dict(), "state_dict_ema": source.state_dict()}, path)
    model = small()
    mambavision.load_checkpoint(model, path)
    assert not same(model, source)
    mambavision.load_checkpoint(model, path, ema=True)
    assert same(model, source)
    mambavision.save_checkpoint({"state_dict": source.state_dict(), "state_dict_ema": None}, path)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        mambavision.load_checkpoint(model, path, ema=True)


def test_norm_layers_of_augmented_images_are_left_out(source, tmp_path):
    """A model that trained with --split-bn is used without it."""
    path = tmp_path / "weights.pth"
    split = timm.layers.convert_splitbn_model(source, 2)
    assert any(".aux_bn." in key for key in split.state_dict())
    mambavision.save_checkpoint({"state_dict": split.state_dict(), "state_dict_ema": split.state_dict()}, path)
    for ema in (False, True):
        model = small()
        assert not mambavision.load_checkpoint(model, path, ema=ema).unexpected
        assert same(model, source)
    again = timm.layers.convert_splitbn_model(small(), 2)
    mambavision.load_checkpoint(again, path)
    assert same(again, split)


# Files that do not fit


def test_another_number_of_classes_names_both_and_the_option(source, tmp_path):
    path = tmp_path / "weights.pth"
    mambavision.save_checkpoint(source.state_dict(), path)
    model = small(num_classes=7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has 10 classes, the model has 7.*skip_head=True"):
        mambavision.load_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    mambavision.load_checkpoint(model, path, skip_head=True)
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_another_model_is_an_error_that_counts(tmp_path):
    path = tmp_path / "weights.pth"
    mambavision.save_checkpoint(small(depths=(1, 2, 2, 2)).state_dict(), path)
    model = small()
    with pytest.raises(CheckpointError, match=r"to another model: .* 14 unexpected \(levels\.1\.blocks\.1\.conv1"):
        mambavision.load_checkpoint(model, path)
    report = mambavision.load_checkpoint(model, path, strict=False)
    assert len(report.unexpected) == 14
    mambavision.save_checkpoint(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match="none of its 2 entries fits"):
        mambavision.load_checkpoint(model, path, strict=False)


def test_pretrained_loading_is_strict_about_the_body(source, tmp_path):
    path = tmp_path / "weights.pth"
    weights = source.state_dict()
    del weights["norm.weight"]
    mambavision.save_checkpoint(weights, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(norm\.weight\)"):
        load_pretrained(small(), path)


def _without_data(value):
    return value.to("meta")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (torch.Tensor.to_sparse, r"norm\.weight is sparse"),
        (_without_data, r"norm\.weight is on the meta device"),
        (lambda value: value.to(torch.complex64), r"norm\.weight holds torch\.complex64 numbers, .* torch\.float32"),
        (lambda value: value.to(torch.int32), r"norm\.weight holds torch\.int32 numbers"),
        (lambda value: value > 0, r"norm\.weight holds torch\.bool numbers"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), r"norm\.weight is sparse or quantized"),
        (lambda value: value * torch.nan, r"1 of its weights are not finite \(norm\.weight\)"),
        (lambda value: value / 0, r"1 of its weights are not finite \(norm\.weight\)"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_nothing_is_changed_unless_all_of_it_fits(spoil, message, strict, source):
    weights = dict(source.state_dict())
    weights["norm.weight"] = spoil(weights["norm.weight"])
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"^file: {message}"):
        load_weights(model, weights, "file", strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_counters_must_be_whole_numbers(source):
    weights = dict(source.state_dict())
    (key, *_) = (key for key in weights if key.endswith("num_batches_tracked"))
    weights[key] = weights[key].float()
    with pytest.raises(CheckpointError, match=r"num_batches_tracked holds torch\.float32"):
        load_weights(small(), weights, "file")


def test_other_precisions_and_infinite_masks_load(source):
    weights = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in source.state_dict().items()
    }
    load_weights(small(), weights, "file")
    model = nn.BatchNorm1d(2)
    model.register_buffer("mask", torch.zeros(2))
    load_weights(model, {**model.state_dict(), "mask": torch.full((2,), -torch.inf)}, "file")
    with pytest.raises(CheckpointError, match="running_var"):
        load_weights(model, {**model.state_dict(), "running_var": torch.full((2,), torch.nan)}, "file")


def test_weights_need_names_and_models_need_memory(source):
    with pytest.raises(CheckpointError, match=r"weights without names \(0\)"):
        load_weights(small(), {"state_dict": {0: torch.ones(1)}}, "file")
    with pytest.raises(CheckpointError, match="meta device"):
        load_weights(small().to("meta"), source.state_dict(), "file")


# Files that are no checkpoints


@pytest.fixture
def whole(source, tmp_path):
    path = tmp_path / "weights.pth"
    mambavision.save_checkpoint({"state_dict": source.state_dict()}, path)
    return path


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(source, tmp_path, suffix, kept):
    path = tmp_path / f"weights{suffix}"
    mambavision.save_checkpoint(source.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"weights\..*(empty|truncated or damaged)"):
        mambavision.load_checkpoint(small(), path)


@pytest.mark.parametrize("content", [b"PK\3\4 and nothing else", b"PK and nothing else"])
def test_damage_is_told_in_whole_sentences(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert re.search(r"damaged \([^.()]+\); download or copy it again\.$", str(error.value))


def test_flipped_bits(whole):
    content = bytearray(whole.read_bytes())
    content[len(content) // 2] ^= 1
    whole.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        read_checkpoint(whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"\n <HTML>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"hello", "is not a checkpoint"),
        (b"import os\nprint(1)\n", "is not a checkpoint"),
        (b"cat\ndog\n", "is not a checkpoint"),  # a pickle that asks for the class at.dog
        (b"\x89PNG\r\n\x1a\n", "is not a checkpoint"),
        (b"\x80\x02GIF89a", "truncated or damaged"),
        (b"\x80\x02.", "truncated or damaged"),
    ],
)
def test_other_files(content, message, tmp_path):
    path = tmp_path / "download.pth.tar"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        mambavision.load_checkpoint(small(), path)
    assert str(path) in str(error.value)
    assert "trust" not in str(error.value)


def test_missing_files_and_other_contents(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: is a folder; give a file"):
        read_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "epoch.pth")
    with pytest.raises(CheckpointError, match="no weights inside; its entries are epoch"):
        mambavision.load_checkpoint(small(), tmp_path / "epoch.pth")


# Files that attack


class _Reduce:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _attacks(canary):
    command = f"touch {canary}"
    return {
        "os.system": _Reduce(os.system, command),
        "eval": _Reduce(eval, f"open({str(canary)!r}, 'w')"),
        "getattr chain": _Reduce(getattr, _Reduce(__import__, "os"), "system"),
        "subprocess": _Reduce(subprocess.Popen, ["touch", str(canary)]),
        "object array": np.array([_Reduce(os.system, command)], dtype=object),
        "inside a namespace": argparse.Namespace(model=_Reduce(os.system, command)),
    }


@pytest.mark.parametrize("attack", _attacks("canary"))
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_attacks_are_refused(attack, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canary, path = tmp_path / "canary", tmp_path / "evil.pth.tar"
    content = {"state_dict": small().state_dict(), "args": _attacks(canary)[attack]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"(?s)refused, because it holds objects other than weights.*trust=True"):
        mambavision.load_checkpoint(small(), path)
    assert not canary.exists()
    if attack == "os.system":  # the file is a working attack, for those who insist
        mambavision.load_checkpoint(small(), path, trust=True)
        assert canary.exists()


def test_attacks_in_other_wrappings_are_refused(tmp_path):
    canary = tmp_path / "canary"
    evil = pickle.dumps({"state_dict": _Reduce(os.system, f"touch {canary}")})
    plain, tarred, nested = tmp_path / "plain.pth", tmp_path / "tarred.pth.tar", tmp_path / "nested.pth"
    plain.write_bytes(evil)
    with tarfile.open(tarred, "w") as archive:
        for name in ("pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(evil)
            archive.addfile(info, io.BytesIO(evil))
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("archive/data.pkl", evil)
        archive.writestr("archive/version", "3\n")
    for path in (plain, tarred, nested):
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    assert not canary.exists()


# Writing


def test_writing_creates_folders_and_leaves_no_residue(source, tmp_path):
    path = tmp_path / "new" / "folder" / "weights.pth"
    mambavision.save_checkpoint(source.state_dict(), path)
    mambavision.save_checkpoint(source.state_dict(), path)
    assert [each.name for each in path.parent.iterdir()] == ["weights.pth"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_failing_to_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new" * (1 // 0))
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_impossible_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/below\.pth: cannot be written \([^)]*\); choose another place\.$"):
        mambavision.save_checkpoint({"x": torch.ones(1)}, tmp_path / "file" / "below.pth")


def test_places_can_be_tried_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "table.csv")
    assert not list(tmp_path.iterdir())
    (tmp_path / "table.csv").write_text("old")
    check_writable(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == "old"
    for path in (tmp_path, tmp_path / "table.csv" / "below.csv", Path("/proc/none/table.csv")):
        with pytest.raises(OutputError, match=f"{path}: cannot be written"):
            check_writable(path)


def test_devices_pipes_and_links_stay_what_they_are(tmp_path):
    """Root could replace them: /dev/null would be a file from then on."""
    link = tmp_path / "link"
    link.symlink_to("results.json")
    (tmp_path / "results.json").write_text("old")
    with replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert (tmp_path / "results.json").read_text() == "new"
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    check_writable(device)
    with replacing(device) as file:
        file.write(b"gone")
    assert device.is_symlink()
    assert Path("/dev/null").is_char_device()
    with (
        pytest.raises(OutputError, match=r"/dev/full: cannot be written \(No space left on device\)"),
        replacing("/dev/full") as file,
    ):
        file.write(b"x")
    assert Path("/dev/full").is_char_device()


def test_full_disks_tell_what_is_free(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"\(No space left on device\); only [\d,]+ bytes are free there"):
        mambavision.save_checkpoint({"x": torch.ones(1)}, tmp_path / "weights.pth")


def test_full_disk_keeps_the_old_file(tmp_path):
    """In a process of its own, whose files may not grow beyond 100 kB."""
    program = f"""
        import resource, signal, torch, mambavision
        from mambavision.running.program import run_cli
        path = {str(tmp_path / "weights.pth")!r}
        mambavision.save_checkpoint({{"x": torch.ones(10)}}, path)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        run_cli(lambda: mambavision.save_checkpoint({{"x": torch.ones(100_000)}}, path))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert result.returncode == 74, result.stderr
    assert re.search(r"weights\.pth: cannot be written \(File too large\); .* [\d,]+ bytes are free", result.stderr)
    assert [each.name for each in tmp_path.iterdir()] == ["weights.pth"]
    assert read_checkpoint(tmp_path / "weights.pth")["x"].shape == (10,)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_really_full_disk_keeps_the_old_file(small_disk):
    path = small_disk / "weights.pth"
    mambavision.save_checkpoint({"x": torch.ones(1_000_000)}, path)  # 4 MB
    with pytest.raises(
        OutputError, match=rf"{path}: .*\(No space left on device\); only [\d,]+ bytes are free"
    ) as full:
        mambavision.save_checkpoint({"x": torch.zeros(1_500_000)}, path)
    assert full.value.exit_status == 74
    assert [each.name for each in small_disk.iterdir()] == ["weights.pth"]
    assert read_checkpoint(path)["x"].sum() == 1_000_000
