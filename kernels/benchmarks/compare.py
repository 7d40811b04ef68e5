"""Side-by-side timing: what is compared takes turns, so that ratios hold even if a machine's speed drifts."""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROUNDS = 21
MIN_SECONDS = 0.01  # of one measurement; quicker functions are called several times in it


@dataclass
class Row:
    """A comparison. `ratio` is that of the medians, the baseline's over ours unless `unit` says otherwise."""

    what: str
    ours_ms: float
    baseline_ms: float
    ratio: float
    floor: float
    aim: float
    unit: str = "x faster"

    @property
    def met(self) -> bool:
        return self.ratio <= self.floor if self.unit.startswith("of") else self.ratio >= self.floor


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


def compare(what: str, ours: Callable, baseline: Callable, floor: float, aim: float) -> Row:
    """Time `ours` against `baseline`."""
    ours_ms, baseline_ms = medians_ms([ours, baseline])
    return Row(what, ours_ms, baseline_ms, baseline_ms / ours_ms, floor, aim)


def require_agreement(what: str, ours: torch.Tensor, baseline: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Refuse to time what does not compute the same.

    Raises:
        AssertionError: The root mean square of the difference is more than `tolerance` of that of `baseline`.
    """
    difference = (ours.double() - baseline.double()).pow(2).mean().sqrt() / baseline.double().pow(2).mean().sqrt()
    if not difference <= tolerance:
        raise AssertionError(f"{what}: results differ by {difference:.1e}")


def peak_mib(function: Callable[[], object]) -> float:
    """Return by how much a call raises the memory of a fresh process, in MiB. `function` must be importable."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of, (function,))


def _peak_of(function: Callable[[Callable | None], object]) -> float:
    before = []
    function(lambda: before.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[0]) / 1024


def machine() -> dict[str, str]:
    """Return what the numbers depend on."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(rows: list[Row], out: Path | None) -> None:
    """Print a table and write the same as JSON to `out`."""
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    width = max(len(row.what) for row in rows)
    print(f"{'':{width}}  {'ours':>10}  {'baseline':>10}  {'ratio':>18}  {'floor':>6}  {'aim':>6}")
    for row in rows:
        ratio = f"{row.ratio:.3g} {row.unit}"
        mark = "" if row.met else "  below the floor"
        print(
            f"{row.what:{width}}  {row.ours_ms:>7.3f} ms  {row.baseline_ms:>7.2f} ms  {ratio:>18}  "
            f"{row.floor:>6g}  {row.aim:>6g}{mark}"
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": facts, "rounds": ROUNDS, "rows": [asdict(row) | {"met": row.met} for row in rows]}
        out.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {out}")
