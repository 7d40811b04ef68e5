"""Files that attack whoever reads them: each is refused in a sentence, and nothing that it names is called."""

import io
import os
import zipfile

import pytest
import torch

import hostile
from checkout import ROOT
from hostile import HOSTILE, archive, bombs, call, legacy, mapping, number, storage, tensor, text
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import CheckpointError
from mambavision.unpickling import program
from mambavision.unpickling.admitted import ADMITTED

SAMPLES = sorted((ROOT / "tests" / "data" / "hostile").glob("*.pth"))


def refusal(path):
    """Return the sentence in which a file is refused."""
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint(path)
    sentence = str(refused.value)
    assert sentence.startswith(f"{path}: ")
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_samples_from_the_wild(path):
    assert "refused" in refusal(path) or "damaged" in refusal(path)


@pytest.mark.parametrize("layout", ["archive", "legacy"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_attacks(attack, layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = mapping(state_dict=mapping(weight=tensor(storage(key="w"))), extra=HOSTILE[attack])
    path = tmp_path / "evil.pth"
    if layout == "archive":
        archive(path, body, {"0": b"\0" * 16, "w": b"\0" * 16})
    else:
        path.write_bytes(legacy(body, b"]" + text("0") + b"a", b"\0" * 24))
    refusal(path)
    assert [each.name for each in tmp_path.iterdir()] == ["evil.pth"]


def test_an_archive_of_the_helpers_is_read(tmp_path):
    """So that the attacks fail for what they are, not for how the file is built."""
    body = mapping(state_dict=mapping(weight=tensor(storage())))
    path = archive(tmp_path / "good.pth", body, {"0": b"\0\0\x80\x3f" * 4})
    assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], torch.ones(4))
    row = tmp_path / "row.pth"
    six = storage().replace(b"tQ", b"NtQ")
    row.write_bytes(
        legacy(mapping(weight=tensor(six)), b"]" + text("0") + b"a", (4).to_bytes(8, "little") + b"\0" * 16)
    )
    assert torch.equal(read_checkpoint(row)["weight"], torch.zeros(4))


def test_archives_that_declare_more_than_they_hold(tmp_path):
    for path in bombs(tmp_path):
        assert "damaged" in refusal(path)


def test_the_largest_archive_member_is_not_read_beyond_the_file(tmp_path, monkeypatch):
    """A part whose central entry declares more bytes than follow it."""
    path = archive(tmp_path / "short.pth", mapping(weight=tensor(storage())), {"0": b"\0" * 16})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        start = content.rindex(b"archive/data/0")
        assert file.getinfo("archive/data/0").file_size == 16
    content[start - 46 + 20 : start - 46 + 28] = (1 << 20).to_bytes(4, "little") * 2
    path.write_bytes(content)
    assert "damaged" in refusal(path)


# The table of what is admitted

ARGUMENTS = {
    "nothing": (),
    "a number": (number(-1),),
    "a large number": (number(1 << 40),),
    "text": (text("x" * 1000),),
    "bytes": (hostile.latin1("AAAAAAAA"),),
    "a list": (b"](" + number(1) * 3 + b"e",),
    "a dictionary": (mapping(a=number(1)),),
    "a tensor": (tensor(storage()),),
    "data": (storage(), number(0), hostile.group(number(1 << 40)), hostile.group(number(0)), b"\x88", b"N"),
    "a function": (hostile.name("builtins.getattr"), text("__class__")),
    "a class": (hostile.name("torch.Tensor"),) * 4,
    "an array of pointers": (call("numpy.dtype", text("O")), hostile.latin1("AAAAAAAA")),
    "many": (number(1),) * 50,
    "none": (b"N",) * 7,
}
STATES = {
    "no state": None,
    "attributes": mapping(__class__=number(1), __dict__=mapping(a=number(1))),
    "slots": hostile.group(mapping(a=number(1)), mapping(b=number(2))),
    "tensor data": hostile.group(storage(), number(0), hostile.group(number(1 << 40)), hostile.group(number(1))),
    "a function": hostile.name("numpy.dtype"),
}
# What the combinations above legitimately describe.
PLAIN = (dict, list, tuple, str, bytes, bool, int, float, type(None), torch.Tensor)


@pytest.mark.parametrize("name", ADMITTED)
def test_nothing_admitted_trusts_its_arguments(name, tmp_path):
    """Each answer is a refusal or a plain value of bounded size."""
    path = tmp_path / "evil.pth"
    for arguments in ARGUMENTS.values():
        for state in STATES.values():
            described = call(name, *arguments)
            body = mapping(value=described if state is None else hostile.build(described, state))
            archive(path, body, {"0": b"\0" * 16})
            try:
                value = read_checkpoint(path)["value"]
            except CheckpointError:
                continue
            assert isinstance(value, PLAIN)
            assert not isinstance(value, torch.Tensor) or value.numel() <= 4


@pytest.mark.parametrize("name", ADMITTED)
def test_every_admitted_name_has_a_reason(name):
    assert ADMITTED[name].reason


def test_reading_is_bounded_by_instructions_and_values(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "_MAX_INSTRUCTIONS", 1000)
    path = archive(tmp_path / "long.pth", mapping(x=b"](" + b"}" * 1000 + b"e"))
    assert "more than 1,000 instructions" in refusal(path)
    monkeypatch.undo()
    monkeypatch.setattr(program, "_MAX_VALUES", 100)
    doubled = b"]q\x01" + b"](h\x01h\x01eq\x01" * 10  # ten lists, which whoever walks through them meets 2047 times
    path = archive(tmp_path / "tree.pth", mapping(x=b"(" + doubled + b"t"))
    assert "refused" in refusal(path) or "damaged" in refusal(path)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, TypeError, ZeroDivisionError, AssertionError])
def test_any_failure_to_read_is_damage(error, tmp_path, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("mambavision.unpickling.load", fail)
    path = archive(tmp_path / "file.pth", mapping())
    assert error.__name__ in refusal(path)


def test_files_that_are_no_files(tmp_path):
    """Nothing is opened that could wait for ever."""
    pipe = tmp_path / "pipe.pth"
    os.mkfifo(pipe)
    loop = tmp_path / "loop.pth"
    loop.symlink_to(loop)
    for path in (pipe, loop, "/dev/zero", tmp_path):
        assert "no such file" in refusal(path) or "folder" in refusal(path)
    tar = tmp_path / "tar.pth"
    tar.write_bytes(b"pickle".ljust(257, b"\0") + b"ustar\x0000")
    assert "tar archive" in refusal(tar)
