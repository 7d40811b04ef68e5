"""Tests that need a GPU: long sequences, tensors with more than 2^31 elements, reproducibility, CUDA graphs."""

import pytest
import torch
from test_mamba_mixer import inputs as mixer_inputs

from conformance import relative_rms
from vision_kernels import (
    conv1d_silu,
    cross_merge,
    cross_scan,
    mamba_mixer,
    neighborhood_attention,
    selective_scan,
    ss2d,
)
from vision_kernels.backends import BACKEND_VARIABLE, OPERATORS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
MADE_FOR_GPUS = ("cuda", "triton")
DIFFERENTIABLE = [operator.name for operator in OPERATORS.values() if operator.composition is None]


@pytest.fixture(params=MADE_FOR_GPUS)
def backend(request, monkeypatch):
    reason = OPERATORS["selective_scan"].named(request.param).why_unavailable()
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv(BACKEND_VARIABLE, request.param)
    return request.param


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def scan_inputs(batch, length, dim, state, dtype=torch.float32):
    """Return the inputs of a scan with channels last."""
    A = (-torch.rand(dim, state, device="cuda") - 0.2).requires_grad_()
    u, delta, B, C = (normal(batch, length, width, dtype=dtype) for width in (dim, dim, state, state))
    return [u, delta, A, B, C, normal(dim), normal(dim)]


def scanned(*tensors):
    return selective_scan(*tensors, delta_softplus=True, channels_last=True)


def calls():
    """Return every operator with differentiable inputs in the sizes and dtypes of the models."""
    half = torch.bfloat16
    weights = normal(4, 8, 96), normal(4, 96, 6), normal(4, 96)
    A = (-torch.rand(4 * 96, 1, device="cuda") - 0.2).requires_grad_()
    image = normal(8, 96, 56, 56, dtype=half)
    return {
        "selective_scan": (scanned, scan_inputs(16, 196, 160, 8, half)),
        "conv1d_silu": (conv1d_silu, [normal(16, 196, 320, dtype=half), normal(320, 3)]),
        "ss2d": (ss2d, [image, *weights, A, normal(4 * 96)]),
        "cross_scan": (cross_scan, [image]),
        "cross_merge": (lambda y: cross_merge(y, 56, 56), [normal(8, 4, 96, 56 * 56, dtype=half)]),
        "neighborhood_attention": (
            lambda query, key, value, bias: neighborhood_attention(query, key, value, 9, bias=bias),
            [*(normal(2, 4, 64, 64, 32, dtype=half) for _ in range(3)), normal(4, 17, 17)],
        ),
    }


def with_gradients(function, inputs):
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_results_are_bitwise_reproducible(backend, operator):
    function, inputs = calls()[operator]
    first, *others = (with_gradients(function, inputs) for _ in range(5))
    for other in others:
        assert all(torch.equal(one, same) for one, same in zip(first, other, strict=True))


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_runs_inside_a_cuda_graph(backend, operator):
    function, inputs = calls()[operator]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = with_gradients(function, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = with_gradients(function, inputs)
    graph.replay()
    assert all(torch.equal(ours, truth) for ours, truth in zip(recorded, expected, strict=True))


@pytest.mark.parametrize(("length", "inner"), [(196, 160), (49, 320), (196, 256), (49, 392)])
def test_mixer_agrees_with_its_parts_and_is_reproducible(backend, length, inner, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE)
    arguments = mixer_inputs(8, length, inner, -(-inner // 8), 8, device="cuda")
    exact = mamba_mixer(*(each.double().cpu() for each in arguments))
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    for dtype, limit in ((torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)):
        arguments[0] = arguments[0].to(dtype)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            first, *others = (mamba_mixer(*arguments) for _ in range(5))
        assert first.dtype == dtype
        assert relative_rms(first.cpu(), exact) < limit
        assert all(torch.equal(first, other) for other in others)


def test_long_sequences(backend, monkeypatch):
    inputs = scan_inputs(1, 65_536, 8, 2)
    found = with_gradients(scanned, inputs)
    monkeypatch.delenv(BACKEND_VARIABLE)
    expected = with_gradients(scanned, [each.detach().cpu().requires_grad_() for each in inputs])
    for ours, truth in zip(found, expected, strict=True):
        assert relative_rms(ours.cpu(), truth) < 1e-4


def test_more_than_2_31_elements(backend):
    """Compare a batch whose last entry begins beyond 2^31 elements with that entry alone."""
    batch, length, dim = 2**15 + 8, 64, 1024
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free memory")
    with torch.no_grad():
        inputs = [each.detach() for each in scan_inputs(batch, length, dim, 1, torch.bfloat16)]
        last = [each[-1:].clone() if each.ndim == 3 else each for each in inputs]
        assert inputs[0].numel() > 2**31
        torch.testing.assert_close(scanned(*inputs)[-1:], scanned(*last))
        weight = torch.randn(dim, 3, device="cuda")
        torch.testing.assert_close(conv1d_silu(inputs[0], weight)[-1:], conv1d_silu(last[0], weight))
        image = inputs[0].view(batch, 8, 8, dim).permute(0, 3, 1, 2)
        assert torch.equal(cross_scan(image[: batch // 4 + 1])[-1:], cross_scan(image[batch // 4 : batch // 4 + 1]))
