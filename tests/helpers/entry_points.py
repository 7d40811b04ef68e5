"""The programs of all tasks: found in the checkout, and run in the process of the tests."""

import argparse
import functools
import runpy
import sys

import pytest

from checkout import ROOT, SOURCES
from engine.options.parser import Parser


def _is_program(path):
    return path.split("/")[0] in ("classification", "object_detection", "semantic_segmentation") and (
        "__main__" in (ROOT / path).read_text()
    )


PROGRAMS = [path for path in SOURCES if _is_program(path)]


class _Parsed(Exception):  # noqa: N818
    """Ends a program as soon as it has its options."""


def run(program, monkeypatch, *words):
    """Run a program in this process."""
    monkeypatch.syspath_prepend(str((ROOT / program).parent))
    sys.modules.pop("check_data", None)  # programs of both tasks have one
    monkeypatch.setattr(sys, "argv", [program, *map(str, words)])
    monkeypatch.setattr("mambavision.running.program._raise_interruptions", lambda: None)
    runpy.run_path(str(ROOT / program), run_name="__main__")


@functools.cache
def parser_of(program):
    """Return the parser of a program."""
    parsers = []

    def parse(self, *arguments, **others):
        parsers.append(self)
        raise _Parsed

    with pytest.MonkeyPatch.context() as monkeypatch:
        for kind in (argparse.ArgumentParser, Parser):
            monkeypatch.setattr(kind, "parse_args", parse)
        with pytest.raises(_Parsed):
            run(program, monkeypatch)
    return parsers[-1]
