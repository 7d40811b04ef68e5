"""The Triton kernels in Triton's interpreter, in sizes that it can handle; on a GPU the other tests cover them.

Each operation of a kernel takes a tenth of a millisecond here, so shapes are small, and blocks of time are too.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import test_conv1d_silu as convolution
import test_cross_scan as crossing
import test_neighborhood_attention as attention
import test_selective_scan as scanning
import test_ss2d as images
import torch

from conformance import poison_unwritten_memory, relative_rms
from vision_kernels import conv1d_silu, cross_scan, ss2d
from vision_kernels.backends import BACKEND_VARIABLE, OPERATORS, overview

pytest.importorskip("triton", reason="Triton is optional")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled for the GPU, in the tests of the operators")

WITH_TRITON = [operator for operator in OPERATORS.values() if operator.composition is None]
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 1e-2), torch.float16: (5e-3, 1e-2)}


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")


@pytest.fixture(params=[False, True], ids=["whole", "chunks"])
def chunks(request, monkeypatch):
    """Split also short sequences into chunks of time."""
    if request.param:
        for module in ("selective_scan.triton_scan", "ss2d.triton_ss2d"):
            monkeypatch.setattr(importlib.import_module(f"vision_kernels.{module}"), "_SHORTEST_CHUNK", 2)


def assert_close(found, expected, dtype):
    forward, gradient = LIMITS[dtype]
    for index, (ours, truth) in enumerate(zip(found, expected, strict=True)):
        limit = gradient if index else forward
        assert ours.dtype == dtype
        if truth.abs().max() > 1e-9:
            assert relative_rms(ours, truth) <= limit, index
        else:
            assert ours.abs().max() < 1e-6, index


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("dim", "length", "state", "groups", "optional", "dtype"),
    [
        (3, 9, 1, 1, True, torch.float32),
        (4, 9, 3, 2, True, torch.float32),
        (3, 5, 8, 1, True, torch.bfloat16),
        (35, 3, 16, 1, False, torch.float16),
    ],
    ids=str,
)
def test_selective_scan(dim, length, state, groups, optional, dtype):
    arguments = scanning.inputs(1, dim, length, state, groups, dtype, optional, softplus=optional)
    weights = torch.randn(1, dim, length, dtype=torch.float64)
    found = scanning.with_gradients(arguments, weights)
    assert_close(found, scanning.oracle(arguments, weights), dtype)
    again = scanning.with_gradients(arguments, weights)
    assert all(torch.equal(ours, same) for ours, same in zip(found, again, strict=True))


def test_selective_scan_in_other_layouts(monkeypatch):
    arguments = scanning.inputs(2, 3, 5, 2, 1)
    expected = scanning.with_gradients(arguments, 1.0)
    poison_unwritten_memory(monkeypatch)
    strided = [
        each.detach().transpose(0, -1).contiguous().transpose(0, -1) if isinstance(each, torch.Tensor) else each
        for each in arguments
    ]
    for ours, theirs in zip(scanning.with_gradients(strided, 1.0), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    last = scanning.in_channels_last(arguments)
    operators = torch.ops.vision_kernels
    y = operators.selective_scan(*last, True, torch.bfloat16)
    torch.testing.assert_close(y.transpose(1, 2).float(), expected[0], rtol=1e-2, atol=1e-2)
    plain = [each.detach() if isinstance(each, torch.Tensor) else each for each in last]
    found = operators.selective_scan_backward(torch.ones(1, 1, 1).expand(2, 5, 3), *plain, True)
    for ours, theirs in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(ours.movedim(1, -1) if ours.ndim > 2 else ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("taps", "length", "dim"), [(1, 1, 1), (3, 33, 70), (4, 5, 6)])
def test_conv1d_silu(taps, length, dim, dtype, monkeypatch):
    arguments = [each.detach() for each in convolution.inputs(1, length, dim, taps, dtype)]
    poison_unwritten_memory(monkeypatch)
    found = convolution.with_gradients(conv1d_silu, arguments)
    exact = [each.double() for each in arguments]
    expected = convolution.with_gradients(convolution._differentiable_oracle, exact)
    assert_close(found, expected, dtype)
    part = torch.cat([arguments[0]] * 2, dim=2)[:, :, :dim]  # half of a wider tensor, as in the mixer
    again = convolution.with_gradients(conv1d_silu, (part, arguments[1]))
    assert all(torch.equal(ours, same) for ours, same in zip(found, again, strict=True))


@pytest.mark.parametrize("routes", crossing.ROUTES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 18), (17, 35), (7, 7)])
def test_cross_scan_and_merge(height, width, routes):
    crossing.test_agrees_with_explicit_tables(None, height, width, routes, torch.float32)
    crossing.test_agrees_with_explicit_tables(None, height, width, routes, torch.bfloat16)
    x = torch.randn(2, 3, height, width)
    assert torch.equal(cross_scan(x.contiguous(memory_format=torch.channels_last), routes), cross_scan(x, routes))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("shape", "routes", "dtype"),
    [
        ((1, 3, 2, 3, 1, 1), "cross", torch.float32),
        ((1, 2, 3, 2, 2, 3), "bidirectional", torch.float32),
        ((1, 2, 2, 3, 2, 1), "unidirectional", torch.bfloat16),
    ],
    ids=str,
)
def test_ss2d(shape, routes, dtype, monkeypatch):
    arguments = [each.detach() for each in images.inputs(*shape, dtype=dtype)]
    weights = torch.randn(shape[:4])
    expected = images.with_gradients([each.double() for each in arguments], weights, routes, function=images.oracle)
    poison_unwritten_memory(monkeypatch)
    found = images.with_gradients(arguments, weights, routes)
    assert_close(found, expected, dtype)


def test_ss2d_reads_any_strides_and_is_reproducible():
    projected = [each.detach() for each in images.projected(*images.inputs(1, 2, 2, 3, 1, 1, torch.bfloat16))]
    operators = torch.ops.vision_kernels
    y = operators.ss2d(*projected, "cross", torch.float32)
    image = projected[0].contiguous(memory_format=torch.channels_last)
    strided = [image, projected[1].transpose(1, 3).contiguous().transpose(1, 3), *projected[2:]]
    torch.testing.assert_close(operators.ss2d(*strided, "cross", torch.float32), y, rtol=0, atol=0)
    grads = [operators.ss2d_backward(torch.ones(()).expand_as(y), *each, "cross") for each in (projected, strided)]
    assert all(torch.equal(ours, same) for ours, same in zip(*grads, strict=True))
    assert grads[1][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("size", "kernel_size", "dilation", "dim", "with_bias", "dtype"),
    [
        ((9, 3), 3, 1, 6, True, torch.float32),
        ((3, 11), 3, 1, 17, False, torch.float16),
        ((6, 7), 3, 2, 4, True, torch.bfloat16),
    ],
    ids=str,
)
def test_neighborhood_attention(size, kernel_size, dilation, dim, with_bias, dtype):
    tensors = attention.inputs(size, kernel_size, dim, 1, 2 // dilation, dtype, with_bias)
    weights = torch.randn(tensors[0].shape).to(dtype)
    found = attention.with_gradients(tensors, weights, kernel_size, dilation)
    assert_close(found, attention.oracle(tensors, weights.double(), kernel_size, dilation), dtype)
    expanded = [None if each is None else each.detach()[:1].expand_as(each) for each in tensors]
    again = attention.with_gradients(expanded, weights, kernel_size, dilation)
    if tensors[3] is None or len(tensors[3]) == 1:
        assert all(torch.equal(ours, same) for ours, same in zip(found, again, strict=True))


def test_small_steps_are_accurate():
    arguments = images.inputs(1, 2, 1, 3, 1, 1)
    arguments[3] = torch.full_like(arguments[3], -12.0)
    exact = [each.detach().double() for each in arguments]
    assert relative_rms(ss2d(*arguments).detach(), images.oracle(*exact, "cross")) < 1e-5


def test_interpreter_runs_only_if_named(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE)
    for operator in WITH_TRITON:
        assert operator.select("cpu").backend != "triton"
        assert operator.named("triton").why_unavailable() is None
    assert "interpreted in Python for tests" in overview()


def test_package_and_overview_work_without_triton():
    program = Path(__file__).parent / "programs" / "overview_without_triton.py"
    printed = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True).stdout
    assert "triton is not installed: pip install triton" in printed


def test_overview_names_the_reason_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.delenv(BACKEND_VARIABLE)
    command = [sys.executable, "-m", "vision_kernels"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in printed.splitlines() if line.split()[:1] == ["triton"]]
    assert len(lines) == len(WITH_TRITON)
    assert all("there is no GPU that torch can use" in line for line in lines)
