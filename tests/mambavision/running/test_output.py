"""Standard output that fails, and other encodings."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "programs" / "print_lines.py"


def run(tmp_path, redirection, *words, **environment):
    command = f'"{sys.executable}" "{PROGRAM}" "{tmp_path / "done"}" "$@" {redirection}'
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
