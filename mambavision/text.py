"""Text from files and users, made safe to print and to write; suggestions for mistyped names."""

import difflib
import json
import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

# Bidirectional controls change how the surrounding text reads.
_REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, separators of lines and paragraphs
_FORMULA = re.compile(r"[=+\-@|%]")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def escaped(text: str, keep: str = "") -> str:
    r"""Escape everything in a text that a terminal or editor would interpret instead of showing it.

    Args:
        text: For example a file or class name. The terminal sequence ``\x1b[2J`` becomes ``\\x1b[2J``, a line break
            ``\\n``, and a byte that is not UTF-8, which Python represents as a surrogate, ``\\xff``.
        keep: Characters that are not escaped.
    """
    if text.isprintable() and text.isascii():
        return text
    return "".join(each if each in keep or not _is_interpreted(each) else _escape(each) for each in text)


def _is_interpreted(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN or ord(character) in _REORDERING


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # "surrogateescape", as in file names
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def csv_cell(value: object) -> object:
    """Return a safe value for a CSV cell: text that a spreadsheet would execute gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = escaped(value)
    return f"'{text}" if _FORMULA.match(text.lstrip()) else text


def as_json(value: Any, indent: int | None = 2) -> str:
    """Return a value of plain types as JSON; non-finite numbers, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
