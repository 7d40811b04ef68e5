"""The numbers and texts in a checkpoint file, without its tensors: to compare files without reading all of them.

The pickle inside is parsed, never executed: no class is looked up and no function called.
"""

import io
import os
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

_MOST_BYTES = 256 * 2**20  # of the pickle, in which tensors take some hundred bytes each
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")
_NUMBERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT")
_CONSTANTS = frozenset((*_TEXTS, *_NUMBERS, "GLOBAL"))
_MAPPING = "collections OrderedDict"
_MARK = object()


def read_outline(path: str | os.PathLike) -> dict[str, Any] | None:
    """Return the dictionary in a file of ``torch.save``, or None if the file is damaged or of another kind.

    Of its values, numbers, texts and dictionaries are there; anything else is None. That the file has an outline does
    not mean that its tensors are whole.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            # torch.save does not compress.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _MOST_BYTES:
                return None
            found = _parse(archive.read(entry))
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, StopIteration):
        return None
    except (ValueError, LookupError, TypeError):  # not a pickle, or one that takes from an empty stack
        return None
    return found if isinstance(found, dict) else None


def _parse(pickled: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(io.BytesIO(pickled)):
        name = opcode.name
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in _BUILDERS:
            _BUILDERS[name](stack)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "STOP":
            break
        else:
            _take(stack, opcode)
    return stack.pop()


def _above_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _reduce(stack: list[Any]) -> None:
    _, function = stack.pop(), stack.pop()
    stack.append({} if function == _MAPPING else None)


def _set_item(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _update(stack[-1], [key, value])


def _set_items(stack: list[Any]) -> None:
    items = _above_mark(stack)
    _update(stack[-1], items)


def _update(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        target.update((key, value) for key, value in pairs if isinstance(key, str))


_BUILDERS: dict[str, Callable[[list[Any]], None]] = {
    "MARK": lambda stack: stack.append(_MARK),
    "EMPTY_DICT": lambda stack: stack.append({}),
    "REDUCE": _reduce,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
}


def _take(stack: list[Any], opcode: pickletools.OpcodeInfo) -> None:
    """Do to the stack what any other operation does, with None for the result."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        _above_mark(stack)
        before = before[: before.index(pickletools.markobject)]
    if opcode.name in ("APPEND", "APPENDS", "ADDITEMS", "BUILD"):  # they change what lies below
        if opcode.name in ("APPEND", "BUILD"):
            stack.pop()
        return
    for _ in before:
        stack.pop()
    stack.extend(None for _ in opcode.stack_after)
