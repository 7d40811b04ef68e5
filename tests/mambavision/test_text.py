"""Names from files and users, as they are shown and written."""

import json
import os

import pytest

from mambavision.text import as_json, csv_cell, escaped


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("Golden retriever, naïve 犬 🐕‍🦺", "Golden retriever, naïve 犬 🐕‍🦺"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("two\nlines\r\ttab", r"two\nlines\r\ttab"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("evil\u202egnp.exe", r"evil\u202egnp.exe"),
        ("line\u2028paragraph\u2029", r"line\u2028paragraph\u2029"),
        (os.fsdecode(b"latin-\xe9.png"), r"latin-\xe9.png"),
        ("\ud800", r"\ud800"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(given, shown):
    assert escaped(given) == shown


def test_some_characters_may_be_kept():
    assert escaped("a\n\x1bb", keep="\n") == "a\n\\x1bb"


@pytest.mark.parametrize("given", ["=1+1", "+1", "-1+1", "@SUM(A1)", " =1", "=cmd|' /C calc'!A0", "%x", "|x"])
def test_cells_that_spreadsheets_execute_are_quoted(given):
    assert str(csv_cell(given)).startswith("'")


@pytest.mark.parametrize("given", ["mamba_vision_T", "a=b", 1.5, -2, None])
def test_other_cells_are_as_they_are(given):
    assert csv_cell(given) == given


def test_json_has_no_numbers_that_are_not_finite():
    value = {"a": [float("nan"), 1.0], "b": (float("inf"), {"c": -float("inf")}), "d": "NaN"}
    assert json.loads(as_json(value), parse_constant=pytest.fail) == {
        "a": [None, 1.0],
        "b": [None, {"c": None}],
        "d": "NaN",
    }
