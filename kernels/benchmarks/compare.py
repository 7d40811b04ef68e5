"""Side-by-side timing: the functions take turns, so that ratios hold even if a machine's speed drifts."""

import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROUNDS = 21
MIN_SECONDS = 0.01  # of one measurement; faster functions are called several times


@dataclass
class Row:
    """A comparison of medians in milliseconds, or in the unit `measure`.

    `ratio` is the speedup of ours or, if `means` begins with "of", ours as a fraction of the baseline.
    """

    what: str
    ours: float
    baseline: float
    ratio: float
    floor: float
    aim: float
    means: str = "x faster"
    measure: str = "ms"

    @property
    def met(self) -> bool:
        return self.ratio <= self.floor if self.means.startswith("of") else self.ratio >= self.floor


def medians_ms(functions: list[Callable[[], object]]) -> list[float]:
    """Call the functions in turn and return the median milliseconds of each."""
    calls = []
    for function in functions:
        function()
        started = time.perf_counter()
        function()
        calls.append(max(1, int(MIN_SECONDS / (time.perf_counter() - started))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, count, measured in zip(functions, calls, times, strict=True):
            started = time.perf_counter()
            for _ in range(count):
                function()
            measured.append((time.perf_counter() - started) / count * 1e3)
    return [statistics.median(each) for each in times]


def compare(
    what: str,
    ours: Callable,
    baseline: Callable,
    floor: float,
    aim: float,
    medians: Callable[[list[Callable]], list[float]] = medians_ms,
) -> Row:
    """Time `ours` against `baseline`; `medians` takes both and returns milliseconds."""
    ours_ms, baseline_ms = medians([ours, baseline])
    return Row(what, ours_ms, baseline_ms, baseline_ms / ours_ms, floor, aim)


def require_agreement(what: str, ours: torch.Tensor, baseline: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Check that the functions to time compute the same.

    Raises:
        AssertionError: The root mean square of the difference exceeds `tolerance` times that of `baseline`.
    """
    difference = (ours.double() - baseline.double()).pow(2).mean().sqrt() / baseline.double().pow(2).mean().sqrt()
    if not difference <= tolerance:
        raise AssertionError(f"{what}: results differ by {difference:.1e}")


def peak_mib(function: Callable[[Callable[[], None]], object]) -> float:
    """Return the memory that `function` adds to a fresh process after it has called its argument, in MiB.

    Linux only. `function` must be importable from the new process.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of, (function,))


def _peak_of(function: Callable[[Callable[[], None]], object]) -> float:
    before = []

    def mark() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory, whose reuse would not be counted
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before.append(_status_kib("VmRSS"))

    function(mark)
    return (_status_kib("VmHWM") - before[0]) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def machine() -> dict[str, str]:
    """Return the facts on which the numbers depend."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [
            line
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(rows: list[Row], out: Path | None, facts: dict[str, str]) -> None:
    """Print a table and write it as JSON to `out`, with the `facts` on which the numbers depend."""
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    width = max(len(row.what) for row in rows)
    print(f"{'':{width}}  {'ours':>11}  {'baseline':>11}  {'ratio':>22}  {'floor':>6}  {'aim':>6}")
    for row in rows:
        ratio = f"{row.ratio:.3g} {row.means}"
        mark = "" if row.met else "  misses the floor"
        print(
            f"{row.what:{width}}  {row.ours:>7.3f} {row.measure:3}  {row.baseline:>7.2f} {row.measure:3}  {ratio:>22}  "
            f"{row.floor:>6g}  {row.aim:>6g}{mark}"
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": facts, "rounds": ROUNDS, "rows": [asdict(row) | {"met": row.met} for row in rows]}
        out.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {out}")
