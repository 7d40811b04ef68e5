"""Checkpoint files that attack whoever reads them, built instruction by instruction."""

import io
import struct
import zipfile
from pathlib import Path


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"\x8a" + bytes([9]) + value.to_bytes(9, "little", signed=True)


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def name(qualified: str) -> bytes:
    module, _, attribute = qualified.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(function: str | bytes, *arguments: bytes) -> bytes:
    return (name(function) if isinstance(function, str) else function) + group(*arguments) + b"R"


def create(kind: str, *arguments: bytes) -> bytes:
    return name(kind) + group(*arguments) + b"\x81"


def build(instance: bytes, state: bytes) -> bytes:
    return instance + state + b"b"


def mapping(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def latin1(data: str) -> bytes:
    return call("_codecs.encode", text(data), text("latin1"))


def storage(key: str = "0", count: int = 4, kind: str = "torch.FloatStorage") -> bytes:
    return group(text("storage"), name(kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(data: bytes, offset: int = 0, size: tuple = (4,), stride: tuple = (1,)) -> bytes:
    hooks = call("collections.OrderedDict")
    shape, steps = group(*map(number, size)), group(*map(number, stride))
    return call("torch._utils._rebuild_tensor_v2", data, number(offset), shape, steps, b"\x89", hooks)


def archive(
    path: Path, body: bytes, data: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    """Write a file in the layout of torch.save whose pickle is `body`."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
        for key, content in (data or {}).items():
            file.writestr(f"archive/data/{key}", content)
    return path


_POINTERS = latin1("AAAAAAAA")
_OBJECTS = call("numpy.dtype", text("O"))
_DOUBLES = call("numpy.dtype", text("f8"))
_ZERO, _NONE, _EMPTY = number(0), b"N", group()

_COLLIDING = [b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 2000)]


def _forged_dtype() -> bytes:
    subarray = group(_DOUBLES, number(1 << 40))
    parts = group(number(3), text("<"), subarray, _NONE, _NONE, number(-1), number(-1), _ZERO)
    return build(call("numpy.dtype", text("f8"), b"\x89", b"\x88"), parts)


def _array(dtype: bytes, shape: bytes, data: bytes) -> bytes:
    made = call("numpy._core.multiarray._reconstruct", name("numpy.ndarray"), group(_ZERO), latin1("b"))
    return build(made, group(number(1), shape, dtype, b"\x89", data))


# Bodies of pickles. Each would call something with arguments that it does not check, or exhaust the reader.
HOSTILE = {
    "array of pointers": call("numpy.ndarray", group(number(1)), _OBJECTS, _POINTERS),
    "set of an array of pointers": call(
        "__builtin__.set", b"]" + call("numpy.ndarray", group(number(1)), _OBJECTS, _POINTERS) + b"a"
    ),
    "array beyond its data": call("numpy.ndarray", group(number(1)), _forged_dtype(), _POINTERS),
    "array of pointers, rebuilt": _array(_OBJECTS, group(number(1)), _POINTERS),
    "array larger than its bytes": _array(_DOUBLES, group(number(1 << 40)), _POINTERS),
    "array of a negative size": _array(_DOUBLES, group(number(-1)), _POINTERS),
    "number of pointers": call("numpy._core.multiarray.scalar", _OBJECTS, _POINTERS),
    "number beyond its bytes": call("numpy._core.multiarray.scalar", _DOUBLES, latin1("A")),
    "dtype of parts": _forged_dtype(),
    "structured dtype": call("numpy.dtype", b"]" + group(text("a"), text("O")) + b"a"),
    "dtype set on an array's class": build(name("numpy.ndarray"), mapping(x=_ZERO)),
    "state set on a function": build(name("numpy.core.multiarray.scalar"), group(mapping(), mapping(x=_ZERO))),
    "any function for a tensor": call(
        "torch._tensor._rebuild_from_type_v2",
        name("__builtin__.getattr"),
        name("torch.Tensor"),
        group(name("mmengine.logging.history_buffer.HistoryBuffer"), text("__init__")),
        _NONE,
    ),
    "another class for a tensor": call(
        "torch._tensor._rebuild_from_type_v2",
        name("torch._utils._rebuild_tensor_v2"),
        name("argparse.Namespace"),
        group(storage(), _ZERO, group(number(4)), group(number(1)), b"\x89", _NONE),
        _NONE,
    ),
    "attribute of anything": call("__builtin__.getattr", name("argparse.Namespace"), text("__init__")),
    "constructor of a history": call(
        "__builtin__.getattr", name("mmengine.logging.history_buffer.HistoryBuffer"), text("__init__")
    ),
    "import": call("__builtin__.__import__", text("os")),
    "shell": call("posix.system", text("touch canary")),
    "evaluation": call("__builtin__.eval", text("open('canary', 'w')")),
    "large bytearray": call("__builtin__.bytearray", number(1 << 40)),
    "large storage": call("torch.storage.UntypedStorage", number(1 << 40)),
    "large legacy tensor": call("torch.FloatTensor", number(1 << 40)),
    "legacy tensor made and filled": build(create("torch.Tensor"), group(storage(), _ZERO, group(), group())),
    "sparse tensor": call("torch._utils._rebuild_sparse_tensor", name("torch.sparse_coo"), group()),
    "nested tensor": call("torch._utils._rebuild_nested_tensor", _ZERO, _ZERO, _ZERO, _ZERO),
    "quantized tensor": call("torch._utils._rebuild_qtensor", storage(), _ZERO, _EMPTY, _EMPTY, _EMPTY, b"\x89", _NONE),
    "tensor on no device": call(
        "torch._utils._rebuild_meta_tensor_no_storage", name("torch.float32"), group(), group(), b"\x89"
    ),
    "tensor beyond its data": tensor(storage(), size=(5,)),
    "tensor before its data": tensor(storage(), offset=-1),
    "tensor of negative strides": tensor(storage(), stride=(-1,)),
    "tensor repeated for ever": tensor(storage(), size=(1 << 40,), stride=(0,)),
    "tensor of overflowing size": tensor(storage(), size=(1 << 62, 1 << 62), stride=(1 << 62, 1)),
    "data larger than the file": tensor(storage(count=1 << 40), size=(1 << 40,)),
    "data of another size": tensor(storage(count=3), size=(3,)),
    "data that is not there": tensor(storage(key="../../../etc/passwd")),
    "data of no kind": tensor(
        group(text("module"), name("torch.FloatStorage"), text("0"), text("cpu"), number(4)) + b"Q"
    ),
    "hooks of a tensor": call(
        "torch._utils._rebuild_tensor_v2",
        storage(), _ZERO, group(number(4)), group(number(1)), b"\x88", mapping(a=name("numpy.dtype")),
    ),
    "a class as a value": name("argparse.Namespace"),
    "a function as a value": name("__builtin__.getattr"),
    "a function inside a tuple": group(name("numpy.ndarray")),
    "a dtype as a value": _DOUBLES,
    "data as a value": storage(),
    "namespace of a namespace's class": build(create("argparse.Namespace"), name("argparse.Namespace")),
    "settings without names": build(create("argparse.Namespace"), b"}" + _ZERO + _ZERO + b"s"),
    "state set twice": build(build(create("argparse.Namespace"), mapping(a=_ZERO)), mapping(b=_ZERO)),
    "history of pointers": build(
        create("mmengine.logging.history_buffer.HistoryBuffer"), mapping(_log_history=_POINTERS)
    ),
    "itself": b"]q\x01h\x01a",
    "nested deeply": b"]" * 5000 + b"a" * 4999,
    "tuples of tuples": b")" + b"".join(b"q\x01h\x01\x86" for _ in range(200)),
    "lists of lists": b"]q\x01" + b"](h\x01h\x01h\x01h\x01eq\x01" * 50,
    "many instructions": b"](" + b"}" * 1_100_000 + b"e",
    "keys that collide": b"}(" + b"".join(_COLLIDING) + b"u",
    "a tuple as a key": b"}" + group(group(_ZERO)) + _ZERO + b"s",
    "text longer than the file": b"X\xff\xff\xff\x7fabc",
    "unknown memory slot": b"h\x07",
    "no operands": b"R",
    "nothing": b"",
    "two results": b"]]",
    "marks without end": b"(" * 1000,
    "an extension": b"\x82\x01",
    "an instance": b"(cos\nsystem\no",
    "a newer instruction": b"\x8c\x02os\x8c\x06system\x93",
}  # fmt: skip


def legacy(body: bytes, keys: bytes = b"]", data: bytes = b"") -> bytes:
    """Return a file in the layout of torch.save before PyTorch 1.6."""
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    system = b"\x80\x02" + mapping(protocol_version=number(1001), little_endian=b"\x88", type_sizes=b"}") + b"."
    return magic + b"\x80\x02M\xe9\x03." + system + b"\x80\x02" + body + b"." + b"\x80\x02" + keys + b"." + data


def bombs(folder: Path) -> list[Path]:
    """Write archives that declare more than they hold."""
    body = mapping(weight=tensor(storage()))
    compressed = archive(folder / "compressed.pth", body, {"0": b"\0" * 16}, zipfile.ZIP_DEFLATED)
    large = archive(folder / "large.pth", mapping(weight=tensor(storage(count=1 << 20), size=(1 << 20,))),
                    {"0": b"\0" * (4 << 20)}, zipfile.ZIP_DEFLATED)  # fmt: skip
    overlapping, content = folder / "overlapping.pth", io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        file.writestr("archive/data/0", b"\0" * 4000)
        entry = file.getinfo("archive/data/0")
        for index in range(1, 50):  # all of them name the same bytes
            twin = zipfile.ZipInfo(f"archive/data/{index}")
            twin.file_size = twin.compress_size = entry.file_size
            twin.CRC, twin.header_offset = entry.CRC, entry.header_offset
            file.filelist.append(twin)
            file.NameToInfo[twin.filename] = twin
    overlapping.write_bytes(content.getvalue())
    return [compressed, large, overlapping]
