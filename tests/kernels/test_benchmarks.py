"""The benchmarks run and report; speed is not tested."""

import importlib
import json
import sys

import pytest
import torch

from checkout import ROOT


@pytest.fixture
def benchmarks(monkeypatch):
    """Yield the modules `compare` and `cpu`, set to measure once."""
    monkeypatch.syspath_prepend(ROOT / "kernels" / "benchmarks")
    compare, cpu = importlib.import_module("compare"), importlib.import_module("cpu")
    monkeypatch.setattr(compare, "ROUNDS", 1)
    monkeypatch.setattr(compare, "MIN_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield compare, cpu
    torch.set_num_threads(threads)
    del sys.modules["compare"], sys.modules["cpu"]


def test_operators_agree_with_their_baselines(benchmarks):
    _, cpu = benchmarks
    rows = [
        row for name, section in cpu.SECTIONS.items() if name not in ("model", "vmamba", "segman") for row in section()
    ]
    assert all(row.ours > 0 and row.baseline > 0 and row.ratio > 0 for row in rows)


def test_disagreement_is_not_timed(benchmarks):
    compare, _ = benchmarks
    with pytest.raises(AssertionError, match=r"scan: results differ by 1\.0e\+00"):
        compare.require_agreement("scan", torch.zeros(3), torch.ones(3))
    with pytest.raises(AssertionError, match="differ by nan"):
        compare.require_agreement("scan", torch.full((3,), float("nan")), torch.ones(3))


def test_report_says_what_is_below_its_floor(benchmarks, tmp_path, capsys):
    compare, _ = benchmarks
    rows = [
        compare.Row("quick", 1.0, 5.0, 5.0, floor=4, aim=6),
        compare.Row("slow", 1.0, 2.0, 2.0, floor=4, aim=6),
        compare.Row("share", 1.0, 100.0, 0.01, floor=0.02, aim=0.01, means="of the whole"),
    ]
    compare.report(rows, tmp_path / "new" / "results.json", compare.machine())
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "misses the floor" in lines["slow"]
    assert not any("misses the floor" in lines[name] for name in ("quick", "share"))
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [row["met"] for row in written["rows"]] == [True, False, True]
    assert written["machine"]["torch"] == torch.__version__
