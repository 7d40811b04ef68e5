"""The files that torch.save writes: a zip archive of pickle and tensor data, or, before PyTorch 1.6, a plain sequence.

Declared sizes are compared with the size of the file before any memory is allocated.
"""

import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambavision.unpickling.admitted import Admitted, RefusedError
from mambavision.unpickling.program import as_plain, follow

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # see torch.serialization
_LEGACY_PROTOCOL = 1001
_SHARED_DATA = 16  # tensors that may share the data of a file, on average


def load(path: Path, with_data: bool = True) -> Any:
    """Return the content of a file of torch.save in plain types, its tensors on the CPU.

    Args:
        path: The file.
        with_data: If False, tensor data are not read, and tensors are on the meta device.

    Raises:
        RefusedError: The file uses a name that is not admitted.
        Exception: The file is damaged; the type of the error depends on the damage.
    """
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    return _from_archive(path, with_data) if is_archive else _from_sequence(path, with_data)


class _Data:
    """The storage of tensors: a sequence of elements of one dtype.

    Args:
        elements: (count,) tensor.
        budget: Bytes that further tensors of the file may have in total, in a list of length one.
    """

    def __init__(self, elements: Tensor, budget: list[int]) -> None:
        self.elements, self._budget = elements, budget

    def tensor(self, dtype: torch.dtype | None, offset: int, size: list[int], stride: list[int]) -> Tensor:
        """Return a tensor on some elements, by default with the storage's dtype; see `admitted.Storage`."""
        elements = self.elements if dtype is None else self.elements.view(dtype)
        if len(size) != len(stride):
            raise ValueError("a tensor whose strides do not match its dimensions")
        count = 1
        for length in size:
            count *= length
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if count and last >= len(elements):
            raise ValueError("a tensor that exceeds its data")
        self._budget[0] -= count * elements.itemsize
        if count > max(1, len(elements)) or self._budget[0] < 0:
            raise ValueError("tensors that declare more elements than the file has")
        return elements.as_strided(size, stride, offset if count else 0)


def _identity(identity: tuple, others: int) -> tuple[str, torch.dtype, int]:
    """Return key, dtype and number of elements of a reference to tensor data in the pickle."""
    kind, storage, key, _location, count, *rest = identity
    has_dtype = isinstance(storage, Admitted) and storage.storage_dtype is not None
    if kind != "storage" or not has_dtype or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("an invalid reference to tensor data")
    if rest != [None] * others:
        raise ValueError("tensor data inside other data, as only the first versions of PyTorch wrote it")
    return key, storage.storage_dtype, count


# Zip archives


def _from_archive(path: Path, with_data: bool) -> Any:
    with zipfile.ZipFile(path) as archive:
        _check_sizes(archive, path.stat().st_size)
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise ValueError("an archive without a checkpoint")
        folder = names[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in archive.namelist():
            raise RefusedError("a TorchScript program")
        program = io.BytesIO(_record(archive, names[0]))
        data = _ArchiveData(archive, folder, path.stat().st_size, with_data)
        return as_plain(follow(program, data.storage))


def _check_sizes(archive: zipfile.ZipFile, file_size: int) -> None:
    """Raise a ValueError if the parts of an archive declare more bytes than the file has."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        raise ValueError("a compressed archive, which torch.save never writes")
    if sum(entry.file_size for entry in entries) > file_size:
        raise ValueError("parts that declare more bytes than the file has")


def _record(archive: zipfile.ZipFile, name: str) -> bytearray:
    """Return a part of an archive after verifying its checksum."""
    data = bytearray(archive.getinfo(name).file_size)
    try:
        with archive.open(name) as part, memoryview(data) as view:
            assert isinstance(part, zipfile.ZipExtFile)
            done = 0
            while done < len(data) and (read := part.readinto(view[done:])):
                done += read
            if done < len(data) or part.read(1):
                raise ValueError(f"the declared size of {name} is wrong")
    except zipfile.BadZipFile as error:
        if "CRC" in str(error):
            raise ValueError(f"{name} does not match its checksum") from error
        raise
    return data


class _ArchiveData:
    """The tensor data of an archive; each part is read once."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, file_size: int, with_data: bool) -> None:
        self._archive, self._folder, self._with_data = archive, folder, with_data
        self._read: dict[str, _Data] = {}
        self._budget = [_SHARED_DATA * file_size]
        order = f"{folder}byteorder"
        is_known = order in archive.namelist()  # since PyTorch 2.1
        self._is_swapped = is_known and bytes(_record(archive, order)).decode() != sys.byteorder

    def storage(self, identity: tuple) -> _Data:
        key, dtype, count = _identity(identity, others=0)
        if key not in self._read:
            name = f"{self._folder}data/{key}"
            size = self._archive.getinfo(name).file_size
            if size != count * dtype.itemsize:
                raise ValueError(f"{name} has {size} bytes, but its tensors declare {count * dtype.itemsize}")
            self._read[key] = _Data(self._elements(name, dtype, count), self._budget)
        data = self._read[key]
        if (data.elements.dtype, len(data.elements)) != (dtype, count):
            raise ValueError("tensors that declare the same data differently")
        return data

    def _elements(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        if not self._with_data:
            return torch.empty(count, dtype=dtype, device="meta")
        elements = _elements(_record(self._archive, name), dtype)
        if self._is_swapped:
            elements.untyped_storage().byteswap(dtype)
        return elements


def _elements(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


# Sequences of pickles and tensor data


def _from_sequence(path: Path, with_data: bool) -> Any:
    content = path.read_bytes()
    file = io.BytesIO(content)
    magic, protocol, system = (as_plain(follow(file, _no_data)) for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise ValueError("not written by torch.save")
    if system.get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError("written on a machine with another byte order")
    data = _SequenceData(len(content), with_data)
    described = follow(file, data.storage)
    if with_data:
        data.fill(as_plain(follow(file, _no_data)), file)
    return as_plain(described)


def _no_data(identity: tuple) -> _Data:
    raise ValueError("a reference to tensor data in an unexpected place")


class _SequenceData:
    """Tensor data after the pickle that refers to them."""

    def __init__(self, file_size: int, with_data: bool) -> None:
        self._device = "cpu" if with_data else "meta"
        self._found: dict[str, _Data] = {}
        self._budget = [_SHARED_DATA * file_size]
        self._bytes_left = file_size

    def storage(self, identity: tuple) -> _Data:
        key, dtype, count = _identity(identity, others=1)
        if key not in self._found:
            self._bytes_left -= count * dtype.itemsize
            if self._bytes_left < 0:
                raise ValueError("tensors that declare more bytes than the file has")
            self._found[key] = _Data(torch.empty(count, dtype=dtype, device=self._device), self._budget)
        data = self._found[key]
        if (data.elements.dtype, len(data.elements)) != (dtype, count):
            raise ValueError("tensors that declare the same data differently")
        return data

    def fill(self, keys: Any, file: io.BytesIO) -> None:
        """Read the data in the order of `keys`; each begins with its number of elements."""
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(self._found):
            raise ValueError("tensor data that do not match the tensors")
        for key in keys:
            elements = self._found[key].elements
            count = int.from_bytes(file.read(8), "little", signed=True)
            part = bytearray(file.read(elements.nbytes))
            if count != len(elements) or len(part) != elements.nbytes:
                raise EOFError("truncated tensor data")
            elements.copy_(_elements(part, elements.dtype))
