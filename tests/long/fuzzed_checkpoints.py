"""Real checkpoints, altered at random where it hurts most: in the instructions of their pickles.

Seeded; FUZZ_SECONDS (default 60) says for how long. Every file is read in full or refused with a CheckpointError: no
crash, no other exception, no new file, no network.
"""

import argparse
import io
import os
import pickletools
import random
import socket
import time
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mambavision.checkpoint import read_checkpoint
from mambavision.errors import CheckpointError
from mambavision.unpickling.admitted import ADMITTED

SEED = int(os.environ.get("FUZZ_SEED") or 0)
SECONDS = float(os.environ.get("FUZZ_SECONDS") or 60)
PLAIN = (dict, list, tuple, str, bytes, bool, int, float, type(None), torch.Tensor)

# Whole instructions to put anywhere, of those that this unpickler knows and of others.
OPCODES = [
    b".", b"(", b"t", b")", b"]", b"}", b"a", b"e", b"s", b"u", b"R", b"\x81", b"b", b"Q", b"N", b"\x88", b"\x89",
    b"\x85", b"\x86", b"\x87", b"K\x00", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff",
    b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"I1\n", b"cos\nsystem\n",
    b"G\x7f\xf8\0\0\0\0\0\0", b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"j\x01\0\0\0", b"X\x01\0\0\0O", b"U\x02f8",
    b"0", b"2", b"1", b"o", b"\x93", b"\x94", b"\x8f", b"\x90", b"\x96" + b"\xff" * 8, b"\x82\x01",
]  # fmt: skip


def instructions(program):
    """Return the instructions of a pickle, each as bytes."""
    starts = [position for *_, position in pickletools.genops(program)]
    return [program[start:end] for start, end in zip(starts, [*starts[1:], len(program)], strict=True)]


def altered(parts, chance, names):
    """Return instructions with some of them dropped, repeated, swapped, replaced or changed in a byte."""
    parts = list(parts)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(1, len(parts))
        kind = chance.randrange(7)
        if kind == 0:
            del parts[place]
        elif kind == 1:
            parts.insert(place, parts[chance.randrange(len(parts))])
        elif kind == 2:
            other = chance.randrange(1, len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        elif kind == 3:
            parts[place] = chance.choice(OPCODES)
        elif kind == 4:
            parts.insert(place, chance.choice(OPCODES))
        elif kind == 5 and parts[place]:
            content = bytearray(parts[place])
            content[chance.randrange(len(content))] = chance.randrange(256)
            parts[place] = bytes(content)
        else:
            module, _, name = chance.choice(names).rpartition(".")
            parts[place] = f"c{module}\n{name}\n".encode()
        if len(parts) < 2:
            break
    return b"".join(parts)


@pytest.fixture(scope="module")
def genuine():
    """What the programs of all tasks save, as files in both layouts of torch.save."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    contents = [
        {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=0.1)},
        {"state_dict": {"a": nn.Parameter(torch.ones(3))}, "metric": np.float64(3), "array": np.arange(4.0)},
        {"message_hub": {"log_scalars": {"loss": HistoryBuffer([1.0, 2.0], [1, 1])}}, "meta": {"seed": 1}},
    ]
    files = []
    for content in contents:
        for is_archive in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=is_archive)
            files.append((is_archive, file.getvalue()))
    return files


def spoiled(is_archive, content, chance, names):
    """Return a file with altered instructions, or sometimes altered bytes anywhere."""
    if chance.random() < 0.1:
        content = bytearray(content)
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        return bytes(content)
    if is_archive:
        result = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
            for entry in old.namelist():
                data = old.read(entry)
                new.writestr(entry, altered(instructions(data), chance, names) if entry.endswith("data.pkl") else data)
        return result.getvalue()
    file = io.BytesIO(content)
    programs = []
    for _ in range(5):  # magic number, version, system, content, order of the data
        start = file.tell()
        for _ in pickletools.genops(file):
            pass
        programs.append(content[start : file.tell()])
    victim = chance.choice([2, 3, 3, 3, 3, 4])
    programs[victim] = altered(instructions(programs[victim]), chance, names)
    return b"".join(programs) + content[file.tell() :]


def check_plain(value):
    assert isinstance(value, PLAIN)
    assert not callable(value) or isinstance(value, torch.Tensor)
    if isinstance(value, torch.Tensor):
        assert value.layout == torch.strided
        value.contiguous().view(-1)[:1].tolist()
        value.sum() if value.dtype != torch.bool and value.itemsize > 1 else None
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        check_plain(each)


def test_altered_checkpoints(genuine, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.chdir(tmp_path)
    chance, names = random.Random(SEED), [*ADMITTED, "os.system", "builtins.eval", "torch.load", "numpy.void"]
    path, counts = tmp_path / "file.pth", {"read": 0, "refused": 0}
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        path.write_bytes(spoiled(*chance.choice(genuine), chance, names))
        try:
            check_plain(read_checkpoint(path))
            counts["read"] += 1
        except CheckpointError:
            counts["refused"] += 1
        assert os.listdir(tmp_path) == ["file.pth"]
    print(counts)
    assert min(counts.values()) > 10  # otherwise it tries nothing
