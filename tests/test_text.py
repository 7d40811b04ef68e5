"""Names from files and users, as they are shown and written."""

import json
import os
import subprocess
import sys
import textwrap

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


PROGRAM = """
    import logging, sys
    from pathlib import Path
    from mambavision.errors import DataError
    from mambavision.running.program import run_cli
    from mambavision.running.logs import start_logging

    def main():
        start_logging()
        for number in range(20_000):
            print("a line that fills the pipe", number)
        logging.getLogger("mambavision").info("a line with %s", "\\x1b[2J and \\n inside")
        print("é…\\udcff")
        Path(sys.argv[1]).write_text("finished")
        if len(sys.argv) > 2:
            raise DataError(f"{sys.argv[2]}: is wrong.")

    run_cli(main)
"""


def run(tmp_path, redirection, *words, **environment):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    command = f'"{sys.executable}" "{script}" "{tmp_path / "done"}" "$@" {redirection}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, "bash", *words],
        capture_output=True,
        env={**os.environ, **environment},
    )


def test_a_closed_pipe_ends_the_output_and_not_the_program(tmp_path):
    result = run(tmp_path, "| head -n 1")
    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "done").read_text() == "finished"


def test_a_full_disk_behind_the_output_is_said_at_the_end(tmp_path):
    result = run(tmp_path, "> /dev/full")
    assert result.returncode == 74
    assert result.stderr.decode().startswith("error: standard output: cannot be written (No space left on device)")
    assert (tmp_path / "done").read_text() == "finished"


def test_other_encodings_and_odd_characters(tmp_path):
    result = run(tmp_path, "", "bad\x1b[31m\nname", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.returncode == 65
    assert result.stderr.decode() == "error: bad\\x1b[31m\\nname: is wrong.\n"
    lines = result.stdout.decode("ascii", "surrogateescape").splitlines()
    assert lines[-2].endswith(r"a line with \x1b[2J and \n inside")
