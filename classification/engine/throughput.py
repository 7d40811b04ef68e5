"""Timing models in turn, so that their ratios hold even when the machine's speed drifts."""

import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from engine.acceleration import amp_dtype_name, compile_arguments, compiled, mixed_precision
from engine.model import create_any, input_size, placed, set_image_size
from engine.options import ThroughputOptions
from mambavision.complexity import Complexity, complexity
from mambavision.files import check_writable, replacing
from mambavision.running.process import pick_device, this_process
from mambavision.running.ranges import check_ranges
from mambavision.text import as_json

_logger = logging.getLogger(__name__)

_SECONDS_PER_TURN = 0.5


@dataclass(frozen=True)
class Timing:
    """One model's row of the table; medians over the rounds."""

    model: str
    input_size: tuple[int, int, int]
    batch_size: int
    images_per_second: float
    latency_ms: float  # of a batch
    ratio: float  # images per second relative to the first model, by round
    memory_mib: float | None  # peak beyond the memory held before; None where it cannot be measured
    params_m: float
    gmacs: float
    gmacs_attention: float
    gmacs_scan: float


@dataclass
class _Contestant:
    name: str
    input_size: tuple[int, int, int]
    batch_size: int
    counts: Complexity
    run: Callable[[], object]
    iterations: int = 1
    memory_mib: float | None = None

    def turn(self, device: torch.device) -> float:
        """Return the seconds per run over one turn."""
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(self.iterations):
            self.run()
        _synchronize(device)
        return (time.perf_counter() - started) / self.iterations


def compare(options: ThroughputOptions) -> None:
    """Time models, print a table, and write JSON if asked."""
    check_ranges(options.flat())
    if options.json:
        check_writable(options.json)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device, this_process())
    sides: Sequence[int | None] = options.resolution or [None]
    contestants = [_warmed_up(options, name, side, device) for name in options.model for side in sides]
    seconds: list[list[float]] = [[each.turn(device) for each in contestants] for _ in range(options.rounds)]
    timings = [_timing(contestants, index, seconds) for index in range(len(contestants))]
    setting = _setting(options, device)
    _print_table(timings, setting)
    if options.json:
        with replacing(options.json) as file:
            file.write(as_json({**setting, "results": [asdict(timing) for timing in timings]}).encode())


def _warmed_up(options: ThroughputOptions, name: str, side: int | None, device: torch.device) -> _Contestant:
    """Return a model that has run, halving the batch until it fits into memory."""
    batch_size = options.batch_size
    contestant: _Contestant | None
    while True:
        try:
            contestant = _contestant(options, name, side, batch_size, device)
            contestant.memory_mib = _peak_memory(contestant.run, device)
            for _ in range(options.warmup):
                contestant.run()
            contestant.iterations = options.iterations or max(1, round(_SECONDS_PER_TURN / contestant.turn(device)))
            return contestant
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        _logger.warning("%s: out of memory with a batch of %d; trying %d", name, batch_size, batch_size // 2)
        contestant, batch_size = None, batch_size // 2
        torch.cuda.empty_cache()


def _contestant(
    options: ThroughputOptions, name: str, side: int | None, batch_size: int, device: torch.device
) -> _Contestant:
    model = create_any(name, pretrained=False, arguments=options.model_kwargs)
    channels, height, width = input_size(model)
    size = (channels, side or height, side or width)
    set_image_size(model, size[1:])
    counts = complexity(model, size)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    model = placed(model, device, options.channels_last).train(options.train)
    images = torch.randn(batch_size, *size, device=device).to(memory_format=memory_format)
    autocast = mixed_precision(options.speed, device)
    forward = compiled(options.speed, model)
    run = (
        _training_run(model, forward, images, autocast) if options.train else _inference_run(forward, images, autocast)
    )
    return _Contestant(name, size, batch_size, counts, run)


def _inference_run(forward: Callable[[Tensor], Tensor], images: Tensor, autocast: Callable) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def run() -> Tensor:
        with autocast():
            return forward(images)

    return run


def _training_run(
    model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, autocast: Callable
) -> Callable[[], None]:
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def run() -> None:
        model.zero_grad()
        with autocast():
            loss = nn.functional.cross_entropy(forward(images), targets)
        loss.backward()

    return run


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """Return the peak memory of one run in MiB, beyond the memory held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        _synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
        before = _resident_mib("VmRSS")
        run()
        # The kernel counts pages late: the difference may be negative for a small run.
        return max(0.0, _resident_mib("VmHWM") - before)
    except OSError:
        return None


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def _timing(contestants: list[_Contestant], index: int, seconds: list[list[float]]) -> Timing:
    first, contestant = contestants[0], contestants[index]
    latency = statistics.median(turns[index] for turns in seconds)
    images = contestant.batch_size / first.batch_size
    return Timing(
        model=contestant.name,
        input_size=contestant.input_size,
        batch_size=contestant.batch_size,
        images_per_second=contestant.batch_size / latency,
        latency_ms=1e3 * latency,
        ratio=statistics.median(images * turns[0] / turns[index] for turns in seconds),
        memory_mib=contestant.memory_mib,
        params_m=contestant.counts.params / 1e6,
        gmacs=contestant.counts.gmacs,
        gmacs_attention=contestant.counts.gmacs_attention,
        gmacs_scan=contestant.counts.gmacs_scan,
    )


def _setting(options: ThroughputOptions, device: torch.device) -> dict[str, str | int | bool]:
    compilation = compile_arguments(options.speed.torchcompile, options.speed.torchcompile_mode)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precision": amp_dtype_name(options.speed, device) if options.speed.amp else "float32",
        "channels_last": options.channels_last,
        "torchcompile": " ".join(compilation.values()) or "off",
        "mode": "training" if options.train else "inference",
        "rounds": options.rounds,
    }


def _print_table(timings: list[Timing], setting: dict[str, str | int | bool]) -> None:
    table = Table(title=", ".join(f"{key} {value}" for key, value in setting.items()), title_justify="left")
    table.add_column("model", no_wrap=True)
    figures = ("images/s", "ms/batch", "ratio", "memory MiB", "params M", "GMACs", "+ attention", "+ scan")
    for heading in ("size", "batch", *figures):
        table.add_column(heading, justify="right")
    for row in timings:
        table.add_row(
            row.model,
            f"{row.input_size[1]}x{row.input_size[2]}",
            str(row.batch_size),
            f"{row.images_per_second:.1f}",
            f"{row.latency_ms:.2f}",
            f"{row.ratio:.2f}",
            "-" if row.memory_mib is None else f"{row.memory_mib:.0f}",
            f"{row.params_m:.2f}",
            f"{row.gmacs:.2f}",
            f"{row.gmacs_attention:.3f}",
            f"{row.gmacs_scan:.3f}",
        )
    Console(width=None if Console().is_terminal else 140).print(table)
