"""Speed of the operators and of whole models on a GPU, each against its peer in the same run.

python kernels/benchmarks/gpu.py [--only scan] [--published FOLDER] [--out FILE.json]

Peers: `mamba-ssm` for the scan; for whole models the published package `mambavision`, installed in a folder of its own
(`pip install --no-deps --target FOLDER mambavision`) because it has the same name as ours, and timm's models. Sections
whose peer is missing are skipped with a message. Results are compared before anything is timed. Floors and aims are
this project's own.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from compare import ROUNDS, Row, compare, machine, report, require_agreement
from torch import Tensor

from vision_kernels import cross_merge, cross_scan, mamba_mixer, selective_scan, ss2d
from vision_kernels.mamba_mixer.composed import mamba_mixer_composed

BATCH = 128
CALLS = 10  # calls of a function in one CUDA graph
WARM_UP, TURN = 20, 20  # forward passes of a model before it is timed, and in a measurement
PUBLISHED = Path(__file__).with_name("published.py")


def gpu_ms(function: Callable[[], object], calls: int) -> float:
    """Return the milliseconds of one of `calls` calls, by CUDA events."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(calls):
        function()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / calls


def kernel_medians_ms(functions: list[Callable[[], object]]) -> list[float]:
    """Time CUDA graphs of the functions in turn, so that launching costs nothing."""
    graphs = [recorded(function) for function in functions]
    times = [[gpu_ms(graph.replay, 1) / CALLS for graph in graphs] for _ in range(ROUNDS)]
    return [statistics.median(each) for each in zip(*times, strict=True)]


def recorded(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    return graph


def gradients(function: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Run the forward and backward pass."""
    return torch.autograd.grad(function(), leaves, grad)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def scan() -> Iterator[Row]:
    """Selective scan at the shapes of MambaVision-T, against mamba_ssm's on the layout that it reads fastest."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    for dim, length, floor, aim_us in ((160, 196, 3.5, 14), (320, 49, 6, 8)):
        what, state = f"scan ({dim},{length},8)", 8
        u, delta = normal(BATCH, length, dim), normal(BATCH, length, dim)
        B, C = normal(BATCH, length, state), normal(BATCH, length, state)
        A = -torch.rand(dim, state, device="cuda") - 0.2
        D, bias = (normal(dim, dtype=torch.float32) for _ in range(2))
        leaves = [each.requires_grad_() for each in (u, delta, A, B, C, D, bias)]
        turned = [each.detach().transpose(1, 2).contiguous() if each.ndim == 3 else each.detach() for each in leaves]
        theirs = [each.requires_grad_() for each in turned]

        def ours(leaves: list[Tensor] = leaves) -> Tensor:
            return selective_scan(*leaves, delta_softplus=True, channels_last=True)

        def peer(theirs: list[Tensor] = theirs) -> Tensor:
            u, delta, A, B, C, D, bias = theirs
            return selective_scan_fn(u, delta, A, B, C, D, None, bias, True)

        grad = normal(BATCH, length, dim)
        grad_turned = grad.transpose(1, 2).contiguous()
        with torch.no_grad():
            require_agreement(what, ours(), peer().transpose(1, 2), 1e-2)
            row = compare(f"{what} forward", ours, peer, floor, floor, kernel_medians_ms)
        yield row
        yield Row(f"{what} forward, time", row.ours, aim_us / 1e3, row.ours / aim_us * 1e3, 2, 1, "of the aim")
        both = (
            functools.partial(gradients, ours, leaves, grad),
            functools.partial(gradients, peer, theirs, grad_turned),
        )
        for mine, truth in zip(both[0](), both[1](), strict=True):
            require_agreement(f"gradient of {what}", mine, truth.transpose(1, 2) if truth.ndim == 3 else truth, 2e-2)
        yield compare(f"{what} forward + backward", *both, 2.5, 4, kernel_medians_ms)


def mixer() -> Iterator[Row]:
    """MambaVision's mixer between its outer projections at the shapes of MambaVision-T: fused, against its parts."""
    for inner, length, aim_us in ((160, 196, 20), (320, 49, 14)):
        what, state, rank = f"mixer ({inner},{length},8)", 8, inner // 8
        weights = normal(2 * inner, 3), normal(rank + 2 * state, inner) * inner**-0.5, normal(inner, rank) * rank**-0.5
        vectors = normal(inner), -torch.rand(inner, state, device="cuda") - 0.2, normal(inner), normal(inner)
        arguments = normal(BATCH, length, 2 * inner), *(each.float() for each in (*weights, *vectors))
        # The parts receive the copies of weights that autocast would make, so that its time does not count.
        halves = *arguments[:2], *(each.bfloat16() for each in arguments[2:5]), *arguments[5:]
        ours, peer = functools.partial(mamba_mixer, *arguments), functools.partial(mamba_mixer_composed, *halves)
        with torch.no_grad():
            require_agreement(what, ours(), peer(), 2e-2)
            row = compare(f"{what} forward", ours, peer, 2, 3, kernel_medians_ms)
        yield row
        yield Row(f"{what} forward, time", row.ours, aim_us / 1e3, row.ours / aim_us * 1e3, 2, 1, "of the aim")


def unfused_ss2d(x, x_proj_weight, dt_weight, dt_bias, A, D) -> Tensor:
    """Compute SS2D as a chain of operators around mamba_ssm's scan."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    height, width, (rank, state) = *x.shape[2:], (dt_weight.shape[2], A.shape[1])
    xs = cross_scan(x)
    low, B, C = torch.einsum("bkdl,kcd->bkcl", xs, x_proj_weight).split([rank, state, state], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", low, dt_weight).flatten(1, 2)
    B, C = B.contiguous(), C.contiguous()
    y = selective_scan_fn(xs.flatten(1, 2), delta, A, B, C, D, None, dt_bias.flatten(), True)
    return cross_merge(y.unflatten(1, (4, -1)), height, width).unflatten(2, (height, width))


def scan_2d() -> Iterator[Row]:
    """The core of SS2D at the shapes of VMamba-T's stages."""
    for dim, side, rank in ((96, 56, 6), (192, 28, 12), (384, 14, 24), (768, 7, 48)):
        what = f"ss2d, D {dim}, {side}x{side}"
        x = normal(BATCH, dim, side, side).to(memory_format=torch.channels_last)
        weights = normal(4, rank + 2, dim) * dim**-0.5, normal(4, dim, rank)
        A, D = -torch.rand(4 * dim, 1, device="cuda") - 0.2, normal(4 * dim, dtype=torch.float32)
        leaves = [each.requires_grad_() for each in (x, *weights, normal(4, dim, dtype=torch.float32), A, D)]
        first = [x.detach().contiguous().requires_grad_(), *leaves[1:]]
        ours, peer = functools.partial(ss2d, *leaves), functools.partial(unfused_ss2d, *first)
        grad = normal(BATCH, dim, side, side)
        with torch.no_grad():
            require_agreement(what, ours(), peer(), 2e-2)
            yield compare(f"{what}, forward", ours, peer, 4, 6, kernel_medians_ms)
        both = (
            functools.partial(gradients, ours, leaves, grad.to(memory_format=torch.channels_last)),
            functools.partial(gradients, peer, first, grad),
        )
        for mine, truth in zip(both[0](), both[1](), strict=True):
            require_agreement(f"gradient of {what}", mine, truth, 3e-2)
        peaks = [peak_mib(each) for each in both]
        yield compare(f"{what}, forward + backward", *both, 2.5, 4, kernel_medians_ms)
        yield Row(f"{what}, training memory", *peaks, peaks[0] / peaks[1], 0.5, 0.3, "of the chain", "MiB")


def peak_mib(function: Callable[[], object]) -> float:
    """Return the peak memory of a call in MiB, beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def inference(model: torch.nn.Module, images: Tensor) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def run() -> Tensor:
        with torch.autocast("cuda"):
            return model(images)

    return run


def training_step(model: torch.nn.Module, images: Tensor) -> Callable[[], None]:
    """Return a step of forward, backward and update, with gradient scaling for float16."""
    targets = torch.zeros(len(images), dtype=torch.long, device="cuda")
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 1e-4, fused=True), torch.amp.GradScaler()

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda"):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return run


def random_images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)


class PublishedPackage:
    """A process that runs the published package; see published.py."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, PUBLISHED], stdin=pipe, stdout=pipe, text=True, env=environment, cwd=folder
        )

    def ask(self, **question: str | int) -> float:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the published package ended with status {self.process.wait()}; its messages are above")
        return json.loads(answer)

    def against(self, what: str, ours: Callable, floor: float, aim: float, **question: str | int) -> Row:
        """Time `ours` and the package's answer to `question` in turn."""
        for _ in range(WARM_UP):
            ours()
        self.ask(do="prepare", warm_up=WARM_UP, **question)
        times = []
        for _ in range(ROUNDS):
            mine = gpu_ms(ours, TURN)
            torch.cuda.synchronize()
            times.append((mine, self.ask(do="time", calls=TURN)))
        mine, theirs = (statistics.median(each) for each in zip(*times, strict=True))
        return Row(what, mine, theirs, theirs / mine, floor, aim)


def models(folder: Path) -> Iterator[Row]:
    """Whole MambaVision models against the published package, in the same mode."""
    import mambavision

    package, images, one = PublishedPackage(folder), random_images(BATCH), random_images(1)
    for name in ("mamba_vision_T", "mamba_vision_S", "mamba_vision_B"):
        model = mambavision.create_model(name).cuda().eval().to(memory_format=torch.channels_last)
        question = {"model": name, "batch": BATCH, "mode": "inference"}
        yield package.against(f"{name}, AMP, batch {BATCH}", inference(model, images), 1.8, 2.5, **question)
    model = mambavision.create_model("mamba_vision_T").cuda().eval().to(memory_format=torch.channels_last)
    question = {"model": "mamba_vision_T", "batch": 1, "mode": "inference"}
    graph = torch.compile(model, backend="cudagraphs")
    yield package.against("mamba_vision_T, AMP, batch 1, as a CUDA graph", inference(graph, one), 4, 4, **question)
    yield package.against("mamba_vision_T, AMP, batch 1, eager", inference(model, one), 1, 4, **question)
    model.train()
    question = {"model": "mamba_vision_T", "batch": BATCH, "mode": "training"}
    yield package.against("mamba_vision_T, training step", training_step(model, images), 1.4, 2, **question)
    package.process.terminate()


def compiled() -> Iterator[Row]:
    """Compiled MambaVision-T against compiled timm models of at least its accuracy."""
    import timm

    import mambavision

    images = random_images(BATCH)
    names = ("convnext_tiny.in12k_ft_in1k", "caformer_s18", "tiny_vit_21m_224")
    timed = [mambavision.create_model("mamba_vision_T"), *(timm.create_model(name) for name in names)]
    runs = []
    for model in timed:
        model = model.cuda().eval().to(memory_format=torch.channels_last)
        runs.append(inference(torch.compile(model, mode="reduce-overhead"), images))
        for _ in range(WARM_UP):
            runs[-1]()
    times = [[gpu_ms(run, TURN) for run in runs] for _ in range(ROUNDS)]
    mine, *theirs = (statistics.median(each) for each in zip(*times, strict=True))
    for name, other in zip(names, theirs, strict=True):
        yield Row(f"mamba_vision_T against {name}, compiled, batch {BATCH}", mine, other, other / mine, 1, 1.3)


def gpu() -> dict[str, str]:
    """Return the facts on which the numbers depend."""
    names = [name for name in ("triton", "mamba-ssm", "timm") if importlib.util.find_spec(name.replace("-", "_"))]
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    facts = {"gpu": torch.cuda.get_device_name(), "driver, clocks, power": driver, "cuda": str(torch.version.cuda)}
    return machine() | facts | {name: version(name) for name in names}


def main() -> None:
    """Run all sections, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"scan": scan, "mixer": mixer, "ss2d": scan_2d, "models": None, "compiled": compiled}
    parser.add_argument("--only", choices=sections, help="one section instead of all")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="where the published mambavision is installed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; cpu.py measures the CPU")
    if options.published:
        sections["models"] = functools.partial(models, options.published)
    torch.backends.cudnn.benchmark = True
    rows = []
    for name in [options.only] if options.only else sections:
        if name in ("scan", "ss2d") and importlib.util.find_spec("mamba_ssm") is None:
            print(f"{name}: skipped, mamba-ssm is not installed")
        elif sections[name] is None:
            print(f"{name}: skipped, --published is not given")
        else:
            rows.extend(sections[name]())
    report(rows, options.out, gpu())


if __name__ == "__main__":
    main()
