"""Call one operator of torch.ops.vision_kernels with arguments that do not fit; run by a test, as it may crash.

    python hostile_arguments.py OPERATOR

Each call is refused in one sentence, by real and by fake tensors alike, or gives what the reference backend gives.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)


def _valid() -> dict[str, tuple]:
    """Return arguments of every operator that fit together."""
    batch, dim, length, state, rank, side = 2, 4, 6, 3, 2, 4

    def r(*shape: int) -> Tensor:
        return torch.rand(*shape) * 0.5

    scan = (r(batch, dim, length), r(batch, dim, length), -r(dim, state), r(batch, 2, state, length))
    scan = (*scan, r(batch, 2, state, length), r(dim), r(dim), True, False)
    conv = (r(batch, length, dim), r(dim, 3))
    attention = (*(r(batch, 2, side, 5, 8) for _ in range(3)), r(2, 5, 5), 3, 1)
    image = (r(batch, dim, side, 5), r(batch, side * 5, 4, rank + 2 * state), r(4, dim, rank), r(4, dim))
    image = (*image, -r(4 * dim, state), r(4 * dim), "cross")
    mixer = (r(batch, length, 8), r(8, 3), r(rank + 2 * state, 4), r(4, rank), r(4), -r(4, state), r(4), r(4))
    return {
        "selective_scan": (*scan, torch.float32),
        "selective_scan_backward": (r(batch, dim, length), *scan),
        "conv1d_silu": conv,
        "conv1d_silu_backward": (r(batch, length, dim), *conv),
        "neighborhood_attention": attention,
        "neighborhood_attention_backward": (r(batch, 2, side, 5, 8), *attention),
        "ss2d": (*image, torch.float32),
        "ss2d_backward": (r(batch, dim, side, 5), *image),
        "cross_scan": (r(batch, dim, side, 5), "cross"),
        "cross_merge": (r(batch, 4, dim, side * 5), side, 5, "cross"),
        "mamba_mixer": mixer,
    }


def _tensors_instead_of(tensor: Tensor) -> Iterator[tuple[str, Any]]:
    yield "nothing", None
    yield "a number", 1.0
    yield "no elements", tensor.new_empty(0)
    yield "a scalar", tensor.new_tensor(1.0)
    yield "another dimension", tensor.unsqueeze(0)
    yield "fewer dimensions", tensor[0]
    yield "a view of one element", tensor.flatten()[:1].expand(tensor.shape)
    yield "reversed dimensions", tensor.permute(*reversed(range(tensor.ndim)))
    for dim in range(tensor.ndim):
        yield f"dimension {dim} is larger", torch.cat((tensor, tensor), dim)
        yield f"dimension {dim} is smaller", tensor.narrow(dim, 0, 1)
        yield f"dimension {dim} is empty", tensor.narrow(dim, 0, 0)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16):
        yield str(dtype), tensor.to(dtype)
    yield "on the meta device", tensor.to("meta")
    yield "sparse", tensor.to_sparse()
    yield "quantized", torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def _others_instead_of(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield "another truth value", not value
    elif isinstance(value, int):
        yield from ((f"{number}", number) for number in (-(2**62), -1, 0, 1, 2, 4, 7, 101, 2**31, 2**62))
    elif isinstance(value, str):
        yield from ((repr(text), text) for text in ("", "nonsense", "cross\0", "x" * 10_000))
    elif isinstance(value, torch.dtype):
        others = (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.qint8, torch.float64)
        yield from ((str(dtype), dtype) for dtype in others)


def hostile(arguments: tuple) -> Iterator[tuple[str, tuple]]:
    """Yield what is wrong, and the arguments."""
    for index, argument in enumerate(arguments):
        instead = _tensors_instead_of if isinstance(argument, Tensor) else _others_instead_of
        for what, value in instead(argument):
            yield f"argument {index}: {what}", (*arguments[:index], value, *arguments[index + 1 :])
    yield "too few", arguments[:-1]
    yield "too many", (*arguments, 1)


def outcome(operator: Any, arguments: tuple) -> Any:
    """Return a tuple of tensors, or the sentence in which the call is refused."""
    try:
        result = operator(*arguments)
    except REFUSALS as error:
        return str(error) or f"{type(error).__name__} that says nothing"
    return result if isinstance(result, tuple) else (result,)


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) and value.layout == torch.strided else value


def check(name: str, what: str, arguments: tuple) -> str:
    """Return what is wrong with the answer to a call; empty if nothing is."""
    operator = getattr(torch.ops.vision_kernels, name)
    found = outcome(operator, arguments)
    os.environ["VISION_KERNELS_BACKEND"] = "reference"
    expected = outcome(operator, arguments)
    del os.environ["VISION_KERNELS_BACKEND"]
    if isinstance(found, str) != isinstance(expected, str):
        return f"{what}: {found} here, {expected} in the reference"
    if isinstance(found, str):
        return ""
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{what}: {ours.shape} {ours.dtype} here, {theirs.shape} {theirs.dtype} in the reference"
        if not ours.is_meta and not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True):
            return f"{what}: other numbers than the reference"
    return ""


def check_fake(name: str, what: str, arguments: tuple) -> str:
    """Return how fake tensors, by which programs are traced, answer otherwise; empty if they do not."""
    real = outcome(getattr(torch.ops.vision_kernels, name), arguments)
    if any(isinstance(each, Tensor) and (each.layout != torch.strided or each.is_quantized) for each in arguments):
        return ""
    with FakeTensorMode() as mode:
        fake = outcome(getattr(torch.ops.vision_kernels, name), tuple(_fake(mode, each) for each in arguments))
    if isinstance(real, str) != isinstance(fake, str):
        return f"{what}: {real} with data, {fake} without"
    if not isinstance(real, str):
        shapes = [(tuple(each.shape), each.dtype) for each in real]
        if shapes != [(tuple(each.shape), each.dtype) for each in fake]:
            return f"{what}: other results without data"
    return ""


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    import vision_kernels  # noqa: F401  (registers the operators)

    name = sys.argv[1]
    arguments = _valid()[name]
    answer = outcome(getattr(torch.ops.vision_kernels, name), arguments)
    assert not isinstance(answer, str), f"the arguments of {name} that fit are refused: {answer}"
    count = 0
    for what, wrong in hostile(arguments):
        print(what, flush=True)  # the last one is the one that crashed
        count += 1
        for problem in (check(name, what, wrong), check_fake(name, what, wrong)):
            if problem:
                print(f"PROBLEM {problem[:600]}")
    print(f"{count} calls")


if __name__ == "__main__":
    main()
