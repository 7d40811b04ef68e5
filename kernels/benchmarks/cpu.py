"""Speed of the operators and of whole models on the CPU, each against a baseline in the same run.

python kernels/benchmarks/cpu.py [--only scan] [--out FILE.json]

Baselines are the step-by-step and unfused definitions in plain PyTorch, which is how the original code runs without its
CUDA extensions. Floors and aims are those this project set itself.
"""

import argparse
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from compare import Row, compare, medians_ms, report, require_agreement
from torch import Tensor

from vision_kernels import selective_scan
from vision_kernels.backends import OPERATORS

# The definitions, as plain functions that autograd follows.
scan_reference = importlib.import_module("vision_kernels.selective_scan.reference").selective_scan_reference


def gradients(function: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Forward and backward pass."""
    return torch.autograd.grad(function().sum(), leaves)


def scan_inputs(batch: int, dim: int, length: int, state: int) -> list[Tensor]:
    """u, delta, A, B, C, D and delta_bias, channels last."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A = -torch.rand(dim, state, generator=generator) - 0.2
    u, delta, B, C = (normal(batch, length, width) for width in (dim, dim, state, state))
    return [u, delta, A, B, C, normal(dim), normal(dim)]


def reference_of(u, delta, A, B, C, D, bias) -> Tensor:
    """The definition on the same channels-last inputs."""
    u, delta, B, C = (each.transpose(1, 2) for each in (u, delta, B, C))
    B, C = B.unsqueeze(1), C.unsqueeze(1)
    return scan_reference(u, delta, A, B, C, D, bias, True, u.dtype).transpose(1, 2)


def scan() -> Iterator[Row]:
    """Selective scan at the shapes of MambaVision-T."""
    inputs = scan_inputs(1, 160, 196, 8)

    def ours() -> Tensor:
        return selective_scan(*inputs, delta_softplus=True, channels_last=True)

    def baseline() -> Tensor:
        return reference_of(*inputs)

    require_agreement("scan", ours(), baseline(), 1e-5)
    torch.set_num_threads(1)
    with torch.no_grad():
        yield compare("scan forward (1,160,196,8), 1 thread", ours, baseline, 75, 120)
        plain = OPERATORS["selective_scan"].named("torch").forward
        u, delta, A, B, C, D, bias = inputs
        first = [u, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, bias, True, True, u.dtype]
        yield compare("scan forward in plain PyTorch, the same", lambda: plain(*first), baseline, 2.5, 4)
    leaves = [each.requires_grad_() for each in inputs]
    for mine, truth in zip(gradients(ours, leaves), gradients(baseline, leaves), strict=True):
        require_agreement("gradient of scan", mine, truth)
    yield compare(
        "scan forward + backward, the same",
        lambda: gradients(ours, leaves),
        lambda: gradients(baseline, leaves),
        40,
        80,
    )
    batch = scan_inputs(8, 160, 196, 8)

    def of_batch() -> Tensor:
        return selective_scan(*batch, delta_softplus=True, channels_last=True)

    def with_threads(count: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            torch.set_num_threads(count)
            return of_batch()

        return run

    with torch.no_grad():
        yield compare("scan batch 8, two threads against one", with_threads(2), with_threads(1), 1.7, 1.9)


def model() -> Iterator[Row]:
    """MambaVision-T as a whole, against timm's models of its size."""
    import timm

    import mambavision

    torch.set_num_threads(2)
    names = ("mamba_vision_T", "swin_tiny_patch4_window7_224", "convnext_tiny")
    models = [timm.create_model(name).eval() for name in names]
    models[0] = mambavision.fold_batch_norm(models[0])
    for batch in (1, 8):
        image = torch.randn(batch, 3, 224, 224)
        with torch.inference_mode():
            ours, swin, convnext = medians_ms([functools.partial(each, image) for each in models])
        yield Row(f"MambaVision-T batch {batch} against swin_tiny", ours, swin, swin / ours, 1, 1)
        yield Row(f"MambaVision-T batch {batch} against convnext_tiny", ours, convnext, convnext / ours, 0, 1)
    image = torch.randn(1, 3, 224, 224)
    halved = models[0].to(torch.bfloat16)
    with torch.inference_mode():
        full = mambavision.fold_batch_norm(timm.create_model("mamba_vision_T").eval())
        yield compare(
            "MambaVision-T bfloat16 against float32", lambda: halved(image.bfloat16()), lambda: full(image), 1.6, 2
        )
        share = share_of_scan(full, image)
    yield Row("share of the scan in MambaVision-T", *share, share[0] / share[1], 0.02, 0.01, "of the whole")


def share_of_scan(model: torch.nn.Module, image: Tensor) -> tuple[float, float]:
    """Return the milliseconds that one forward pass spends in the scan, and in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            model(image)
    events = profiler.key_averages()
    scan_us = sum(event.cpu_time_total for event in events if event.key == "vision_kernels::selective_scan")
    return scan_us / 5e3, sum(event.self_cpu_time_total for event in events) / 5e3


SECTIONS = {"scan": scan, "model": model}


def main() -> None:
    """Run all sections, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section instead of all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    options = parser.parse_args()
    chosen = [options.only] if options.only else SECTIONS
    rows = [row for name in chosen for row in SECTIONS[name]()]
    report(rows, options.out)


if __name__ == "__main__":
    main()
