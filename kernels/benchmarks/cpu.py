"""Speed of the operators and of whole models on the CPU, each against a baseline in the same run.

python kernels/benchmarks/cpu.py [--only scan] [--out FILE.json]

Baselines are the step-by-step and unfused definitions in plain PyTorch, as the original code runs without its CUDA
extensions. Floors and aims are this project's own.
"""

import argparse
import copy
import functools
import importlib
import os
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from compare import Row, compare, machine, medians_ms, peak_mib, report, require_agreement
from torch import Tensor

from vision_kernels import cross_merge, cross_scan, neighborhood_attention, selective_scan, ss2d
from vision_kernels.backends import BACKEND_VARIABLE, OPERATORS
from vision_kernels.selective_scan.arguments import ScanArguments

# Found by name, because the package's attribute `selective_scan` is the function.
scan_reference = importlib.import_module("vision_kernels.selective_scan.reference")


def gradients(function: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Run the forward and backward pass."""
    return torch.autograd.grad(function().sum(), leaves)


def scan_inputs(batch: int, dim: int, length: int, state: int) -> list[Tensor]:
    """Return u, delta, A, B, C, D and delta_bias, channels last."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A = -torch.rand(dim, state, generator=generator) - 0.2
    u, delta, B, C = (normal(batch, length, width) for width in (dim, dim, state, state))
    return [u, delta, A, B, C, normal(dim), normal(dim)]


def scan_arguments(u, delta, A, B, C, D, bias) -> ScanArguments:
    """Return the arguments of a backend for the same channels-last inputs."""
    return ScanArguments(u, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, bias, True, True, u.dtype)


def scan() -> Iterator[Row]:
    """Selective scan at the shapes of MambaVision-T."""
    inputs = scan_inputs(1, 160, 196, 8)

    def ours() -> Tensor:
        return selective_scan(*inputs, delta_softplus=True, channels_last=True)

    def baseline() -> Tensor:
        return scan_reference.forward(scan_arguments(*inputs))

    require_agreement("scan", ours(), baseline(), 1e-5)
    torch.set_num_threads(1)
    with torch.no_grad():
        yield compare("scan forward (1,160,196,8), 1 thread", ours, baseline, 75, 120)
        plain = functools.partial(OPERATORS["selective_scan"].named("torch").forward, scan_arguments(*inputs))
        yield compare("scan forward in plain PyTorch, the same", plain, baseline, 2.5, 4)
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


def routes() -> Iterator[Row]:
    """Cross scan and cross merge at the shape of VMamba-T's first stage, against PyTorch's transpositions and flips."""
    torch.set_num_threads(1)
    image = torch.randn(1, 96, 56, 56)
    sequences = cross_scan(image)
    calls = {
        "cross_scan": (lambda: cross_scan(image), (image, "cross")),
        "cross_merge": (lambda: cross_merge(sequences, 56, 56), (sequences, 56, 56, "cross")),
    }
    for name, (ours, arguments) in calls.items():
        baseline = functools.partial(OPERATORS[name].named("torch").forward, *arguments)
        require_agreement(name, ours(), baseline(), 0)
        yield compare(f"{name} (1,96,56,56)", ours, baseline, floor=0, aim=2)  # an aim without a floor


def unfused_ss2d(x, x_proj_weight, dt_weight, dt_bias, A, D) -> Tensor:
    """Compute SS2D like the originals without their extension, but faster: time is unbound before the loop."""
    height, width, (rank, state) = *x.shape[2:], (dt_weight.shape[2], A.shape[1])
    xs = cross_scan(x)
    low, B, C = torch.einsum("bkdl,kcd->bkcl", xs, x_proj_weight).split([rank, state, state], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", low, dt_weight) + dt_bias[..., None]
    delta, u = torch.nn.functional.softplus(delta.flatten(1, 2)), xs.flatten(1, 2)
    B, C = (each.repeat_interleave(x.shape[1], dim=1) for each in (B, C))  # (batch, 4 dim, state, length)
    decay = torch.exp(delta.unsqueeze(2) * A.unsqueeze(-1))
    drive = (delta * u).unsqueeze(2) * B
    h, outputs = torch.zeros_like(drive[..., 0]), []
    for a, b, c in zip(decay.unbind(-1), drive.unbind(-1), C.unbind(-1), strict=True):
        h = a * h + b
        outputs.append((h * c).sum(-1))
    y = torch.stack(outputs, dim=-1) + D[:, None] * u
    return cross_merge(y.unflatten(1, (4, -1)), height, width).unflatten(2, (height, width))


def scan_2d() -> Iterator[Row]:
    """The core of SS2D at the shapes of VMamba-T's first stages."""
    torch.set_num_threads(1)
    for dim, side, rank in ((96, 56, 6), (192, 28, 12)):
        generator = torch.Generator().manual_seed(0)
        shapes = (1, dim, side, side), (4, rank + 2, dim), (4, dim, rank), (4, dim), (4 * dim, 1), (4 * dim,)
        leaves = [torch.randn(shape, generator=generator) for shape in shapes]
        leaves[1] *= dim**-0.5
        leaves[4] = -leaves[4].exp()
        ours, baseline = functools.partial(ss2d, *leaves), functools.partial(unfused_ss2d, *leaves)
        what = f"ss2d, D {dim}, {side}x{side}"
        require_agreement(what, ours(), baseline(), 1e-5)
        with torch.no_grad():
            yield compare(f"{what}, forward", ours, baseline, 20, 45)
        leaves = [each.requires_grad_() for each in leaves]
        for mine, truth in zip(gradients(ours, leaves), gradients(baseline, leaves), strict=True):
            require_agreement(f"gradient of {what}", mine, truth)
        both = functools.partial(gradients, ours, leaves), functools.partial(gradients, baseline, leaves)
        yield compare(f"{what}, forward + backward", *both, 10, 25)


def attention_maps() -> list[Tensor]:
    """Return query, key and value of a 64x64 map with two heads of 32 channels, and the bias of 11x11 windows."""
    generator = torch.Generator().manual_seed(0)
    return [*torch.randn(3, 1, 2, 64, 64, 32, generator=generator), torch.randn(2, 21, 21, generator=generator)]


def attend(backend: str, maps: list[Tensor]) -> Tensor:
    """Compute attention by a backend; an empty name stands for the active one."""
    os.environ[BACKEND_VARIABLE] = backend and f"neighborhood_attention={backend}"
    query, key, value, bias = maps
    return neighborhood_attention(query, key, value, 11, bias=bias)


def attend_once(backend: str, mark: Callable[[], None]) -> None:
    """Measured by `peak_mib`."""
    torch.set_num_threads(1)
    maps = attention_maps()
    attend(backend, [each[..., :11, :11, :4] if each.ndim == 5 else each for each in maps])  # load everything first
    mark()
    attend(backend, maps)


def attention() -> Iterator[Row]:
    """Neighborhood attention with bias, against gathering all neighbours."""
    torch.set_num_threads(1)
    maps = attention_maps()
    ours, baseline = functools.partial(attend, "", maps), functools.partial(attend, "reference", maps)
    with torch.no_grad():
        require_agreement("attention", ours(), baseline(), 1e-5)
        yield compare("neighbourhood attention 64x64, k 11, forward", ours, baseline, 5, 10)
    leaves = [each.requires_grad_() for each in maps]
    both = functools.partial(gradients, ours, leaves), functools.partial(gradients, baseline, leaves)
    yield compare("neighbourhood attention, forward + backward", *both, 5, 10)
    os.environ.pop(BACKEND_VARIABLE)
    if sys.platform != "linux":
        return
    peaks = [peak_mib(functools.partial(attend_once, backend)) for backend in ("", "reference")]
    yield Row("peak memory of the same, forward", *peaks, peaks[0] / peaks[1], 0.2, 0.1, "of the baseline", "MiB")


def against(peer_name: str, ours: torch.nn.Module, batch: int, floor: float) -> Row:
    """Time a model against one of timm's in its faster memory format."""
    import timm

    image = torch.randn(batch, 3, 224, 224)
    last = image.to(memory_format=torch.channels_last)
    peer = timm.create_model(peer_name).eval()
    peer_last = copy.deepcopy(peer).to(memory_format=torch.channels_last)
    calls = [functools.partial(ours, last), functools.partial(peer, image), functools.partial(peer_last, last)]
    with torch.inference_mode():
        mine, *theirs = medians_ms(calls)
    return Row(f"MambaVision-T batch {batch} against {peer_name}", mine, min(theirs), min(theirs) / mine, floor, 1)


def model() -> Iterator[Row]:
    """MambaVision-T as a whole, against timm's models of its size."""
    import timm

    import mambavision

    torch.set_num_threads(2)
    ours = mambavision.fold_batch_norm(timm.create_model("mamba_vision_T").eval()).to(memory_format=torch.channels_last)
    for batch in (1, 8):
        yield against("swin_tiny_patch4_window7_224", ours, batch, floor=1)
        yield against("convnext_tiny", ours, batch, floor=0)  # an aim without a floor
    image = torch.randn(1, 3, 224, 224).to(memory_format=torch.channels_last)
    halved, half_image = copy.deepcopy(ours).to(torch.bfloat16), image.to(torch.bfloat16)
    with torch.inference_mode():
        yield compare("MambaVision-T bfloat16 against float32", lambda: halved(half_image), lambda: ours(image), 1.6, 2)
        share = share_of_scan(ours, image)
    yield Row("share of the scan in MambaVision-T", *share, share[0] / share[1], 0.02, 0.01, "of the whole", "ms")


def unfused(*tensors: Tensor, routes: str, out_dtype: torch.dtype) -> Tensor:
    """Replacement for `ss2d` in a model."""
    return unfused_ss2d(*tensors)


UNFUSED = unittest.mock.patch("mambavision.models.ss2d.ss2d", unfused)


def vmamba() -> Iterator[Row]:
    """VMamba-T as a whole, against itself around the unfused SS2D."""
    import mambavision

    torch.set_num_threads(2)
    model, image = mambavision.create_model("vmamba_tiny_s1l8").eval(), torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        require_agreement("VMamba-T", model(image), UNFUSED(model)(image), 1e-5)
        yield compare("VMamba-T (s1l8), batch 1, forward", lambda: model(image), lambda: UNFUSED(model)(image), 2.5, 4)


def segman_features(backend: str, image: Tensor, model: torch.nn.Module) -> list[Tensor]:
    """Features of an encoder with a backend of neighbourhood attention; "reference" also takes the unfused SS2D."""
    os.environ[BACKEND_VARIABLE] = backend and f"neighborhood_attention={backend}"
    features = functools.partial(model.forward_intermediates, image, intermediates_only=True)
    with torch.inference_mode():
        return UNFUSED(features)() if backend else features()


def segman_once(backend: str, mark: Callable[[], None]) -> None:
    """Measured by `peak_mib`."""
    import mambavision

    torch.set_num_threads(2)
    model = mambavision.create_model("segman_encoder_s").eval()
    segman_features(backend, torch.randn(1, 3, 64, 64), model)  # load everything first
    image = torch.randn(1, 3, 512, 512)
    mark()
    segman_features(backend, image, model)


def segman() -> Iterator[Row]:
    """SegMAN-S's encoder at the size of segmentation, against gathered neighbours and the unfused SS2D."""
    import mambavision

    torch.set_num_threads(2)
    model, image = mambavision.create_model("segman_encoder_s").eval(), torch.randn(1, 3, 512, 512)
    ours, baseline = (functools.partial(segman_features, backend, image, model) for backend in ("", "reference"))
    for mine, truth in zip(ours(), baseline(), strict=True):
        require_agreement("SegMAN-S encoder", mine, truth, 1e-4)
    yield compare("SegMAN-S encoder 512x512, batch 1, forward", ours, baseline, 3, 6)
    os.environ.pop(BACKEND_VARIABLE)
    if sys.platform == "linux":
        peaks = [peak_mib(functools.partial(segman_once, backend)) for backend in ("", "reference")]
        yield Row("peak memory of the same", *peaks, peaks[0] / peaks[1], 0.5, 0.5, "of the baseline", "MiB")


def share_of_scan(model: torch.nn.Module, image: Tensor) -> tuple[float, float]:
    """Return the milliseconds of the scan in one forward pass, and of the whole pass."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            model(image)
    events = profiler.key_averages()
    scan_us = sum(event.cpu_time_total for event in events if event.key == "vision_kernels::selective_scan")
    return scan_us / 5e3, sum(event.self_cpu_time_total for event in events) / 5e3


OPERATORS_ALONE = {"scan": scan, "routes": routes, "ss2d": scan_2d, "attention": attention}
SECTIONS = {**OPERATORS_ALONE, "model": model, "vmamba": vmamba, "segman": segman}


def main() -> None:
    """Run all sections, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section instead of all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    options = parser.parse_args()
    chosen = [options.only] if options.only else SECTIONS
    rows = [row for name in chosen for row in SECTIONS[name]()]
    report(rows, options.out, machine())


if __name__ == "__main__":
    main()
