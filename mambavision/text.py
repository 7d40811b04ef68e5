"""Text from files and users, made safe to show and to write."""

import json
import math
import re
import unicodedata
from typing import Any

# Characters that change how the text around them reads: bidirectional controls.
_REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, separators of lines and paragraphs
_FORMULA = re.compile(r"[=+\-@|%]")


def escaped(text: str, keep: str = "") -> str:
    r"""Return a text with everything escaped that a terminal or an editor would obey instead of showing it.

    Args:
        text: Such as a file or class name: ``\x1b[2J`` of a terminal becomes ``\\x1b[2J``, a line break ``\\n``, and a
            byte that is no UTF-8, which Python has as a surrogate, ``\\xff``.
        keep: Characters to leave as they are.
    """
    if text.isprintable() and text.isascii():
        return text
    return "".join(each if each in keep or not _is_obeyed(each) else _escape(each) for each in text)


def _is_obeyed(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN or ord(character) in _REORDERING


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # "surrogateescape", as in file names
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def csv_cell(value: object) -> object:
    """Return what a cell of a CSV file may hold: text that a spreadsheet would execute begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = escaped(value)
    return f"'{text}" if _FORMULA.match(text.lstrip()) else text


def as_json(value: Any, indent: int | None = 2) -> str:
    """Return a value of plain types as JSON, which has no numbers that are not finite: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
