"""Extreme numbers, infinities and NaN in every backend of every operator, Triton's interpreter among them."""

import importlib.util

import pytest
import torch

from conformance import backends, force
from vision_kernels import conv1d_silu, mamba_mixer, selective_scan
from vision_kernels.backends import OPERATORS

INFINITY, NAN = float("inf"), float("nan")
MAGNITUDES = (0.0, 1e-45, 1e-38, 1e-4, 1.0, 20.0, 87.0, 88.0, 104.0, 1e4, 1e36, 1e38, 3.4e38, INFINITY)
TINY = 2e-36  # what is smaller may be 0: float32 has no normal numbers below 1e-38, and silu multiplies by up to 90


def with_triton(name):
    """The operator's backends, and Triton's interpreter, which runs only if it is named."""
    on_gpu = torch.cuda.is_available() or importlib.util.find_spec("triton") is None
    has_triton = any(each.backend == "triton" for each in OPERATORS[name].implementations)
    return backends(OPERATORS[name]) + (["triton"] if has_triton and not on_gpu else [])


def of_all_backends(*names):
    """Parametrize a test by the backends of operators, as (operator, backend)."""
    cases = [pytest.param(name, each, id=f"{name}-{each}") for name in names for each in with_triton(name)]
    return pytest.mark.parametrize(("name", "backend"), cases)


def extremes():
    """Numbers of both signs, and NaN with several contents."""
    numbers = torch.tensor([sign * each for each in MAGNITUDES for sign in (1, -1)])
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x400000], dtype=torch.int32)
    return torch.cat([numbers, bits.view(torch.float32)])


def silu_and_slope(x):
    """In float64, with the limits at infinities."""
    x = x.double()
    gate, finite = torch.sigmoid(x), x.clamp(-1e300, 1e300)
    return x.clamp(min=-1e300) * gate, gate * (1 + finite * (1 - gate))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=2e-5, atol=TINY, equal_nan=True)


@of_all_backends("conv1d_silu")
@pytest.mark.parametrize("layout", [(1, 1, -1), (1, -1, 1)], ids=["channels", "steps"])
def test_silu_of_extremes(name, backend, layout, monkeypatch):
    force(backend, monkeypatch, OPERATORS[name])
    x = extremes().view(layout).requires_grad_()
    weight = torch.ones(x.shape[2], 1)
    y = conv1d_silu(x, weight)
    y.backward(torch.ones_like(y))
    value, slope = silu_and_slope(x.detach())
    assert_close(y.detach(), value)
    assert_close(x.grad, slope)
    assert y[x < 0].signbit().logical_or(x[x < 0] > -1).all()  # -0 for all that is far below zero


@of_all_backends("mamba_mixer")
def test_silu_of_extremes_in_the_mixer(name, backend, monkeypatch):
    force(backend, monkeypatch, OPERATORS[name])
    z = torch.cat([extremes(), torch.ones(3)])
    inner = len(z)
    xz = torch.cat([torch.ones(inner), z]).view(1, 1, -1)
    taps = torch.tensor([0.0, 1.0, 0.0]).expand(2 * inner, 3)
    weights = torch.zeros(4 + 2 * 8, inner), torch.zeros(inner, 4), torch.zeros(inner)
    y = mamba_mixer(xz, taps, *weights, -torch.ones(inner, 8), torch.ones(inner), torch.zeros(inner))
    assert_close(y[0, 0, inner:], silu_and_slope(z)[0])
    assert y[0, 0, :inner].isfinite().all()


@of_all_backends("selective_scan")
def test_softplus_of_extremes(name, backend, monkeypatch):
    """A scan of one step is softplus(delta) u B C."""
    force(backend, monkeypatch, OPERATORS[name])
    delta = extremes().view(1, -1, 1).requires_grad_()
    one = torch.ones(1, 1, 1, 1)
    y = selective_scan(torch.ones_like(delta), delta, -torch.ones(delta.shape[1], 1), one, one, delta_softplus=True)
    y.sum().backward()
    raw = delta.detach().double()
    assert_close(y.detach(), torch.logaddexp(raw, torch.zeros(())).where(~raw.isnan(), NAN))
    assert_close(delta.grad, torch.sigmoid(raw))


@of_all_backends("ss2d")
def test_softplus_of_extremes_in_images(name, backend, monkeypatch):
    force(backend, monkeypatch, OPERATORS[name])
    bias = extremes().repeat(4, 1).requires_grad_()
    dim = bias.shape[1]
    projections = torch.tensor([0.0, 1.0, 1.0]).expand(1, 1, 4, 3)
    fixed = torch.ones(4, dim, 1), bias, -torch.ones(4 * dim, 1), torch.zeros(4 * dim)
    y = torch.ops.vision_kernels.ss2d(torch.ones(1, dim, 1, 1), projections, *fixed, "cross", torch.float32)
    y.sum().backward()
    raw = bias.detach().double()
    assert_close(y.detach().flatten(), 4 * torch.logaddexp(raw[0], torch.zeros(())).where(~raw[0].isnan(), NAN))
    known = raw != INFINITY  # infinite steps are multiplied by states that are zero
    assert_close(bias.grad[known], torch.sigmoid(raw[known]))


@of_all_backends("selective_scan")
def test_exponentials_of_extremes(name, backend, monkeypatch):
    """The second step of a scan is exp(A) if its delta, and the product of delta and u before, are 1."""
    force(backend, monkeypatch, OPERATORS[name])
    more = torch.tensor([88.5, 88.72, 88.73, -87.3, 89.0, 127.0, -127.0])
    A = torch.cat([extremes(), more]).view(-1, 1)
    A = A[~(A > 2e4)].view(-1, 1).requires_grad_()  # the first step, a thousandth, stays finite
    delta, u = (torch.tensor(each).expand(1, len(A), 2) for each in ([2.0**-10, 1.0], [2.0**10, 0.0]))
    y = selective_scan(u, delta, A, *[torch.ones(1, 1, 1, 2)] * 2)
    y[:, :, 1].sum().backward()
    expected = A.detach().double().exp().float()
    assert_close(y[0, :, 1].detach(), expected.flatten())
    known = expected < 3e38  # infinities are multiplied by the state before the first step, zero
    assert_close(A.grad[known], expected[known])
    assert A.grad[expected.isnan()].isnan().all()
