"""Conformance of every backend of conv1d_silu."""

import pytest
import torch
import torch.nn.functional as F

from conformance import backends, force, poison_unwritten_memory, relative_rms
from vision_kernels import conv1d_silu
from vision_kernels.backends import BACKEND_VARIABLE
from vision_kernels.conv1d_silu.op import OPERATOR


@pytest.fixture(params=backends(OPERATOR))
def backend(request, monkeypatch):
    return force(request.param, monkeypatch, OPERATOR)


def inputs(batch=2, length=7, dim=6, taps=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((batch, length, dim), (dim, taps))
    ]


def oracle(x, weight):
    """Return the sum over taps, step by step, in float64."""
    x, weight = x.detach().double(), weight.detach().double()
    padded = F.pad(x, (0, 0, (weight.shape[1] - 1) // 2, weight.shape[1] // 2))
    total = sum(padded[:, k : k + x.shape[1]] * weight[:, k] for k in range(weight.shape[1]))
    return total / (1 + torch.exp(-total))


def with_gradients(function, arguments):
    leaves = [each.detach().requires_grad_() for each in arguments]
    y = function(*leaves)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    return [y.detach()] + [each.grad for each in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 6, 64, 70])
@pytest.mark.parametrize("length", [1, 2, 31, 33, 97])
@pytest.mark.parametrize("taps", [1, 3, 4])
def test_agrees_with_a_float64_oracle(backend, taps, length, dim, dtype):
    arguments = inputs(2, length, dim, taps, dtype)
    found = with_gradients(conv1d_silu, arguments)
    exact = [each.detach().double().requires_grad_() for each in arguments]
    expected = with_gradients(_differentiable_oracle, exact)
    limits = (1e-5, 1e-4, 1e-4) if dtype == torch.float32 else (5e-3, 1e-2, 1e-2)
    assert relative_rms(found[0], oracle(*arguments)) <= limits[0]
    for ours, truth, limit in zip(found, expected, limits, strict=True):
        assert relative_rms(ours, truth) <= limit
    assert [each.dtype for each in found] == [dtype] * 3


def _differentiable_oracle(x, weight):
    padded = F.pad(x, (0, 0, (weight.shape[1] - 1) // 2, weight.shape[1] // 2))
    return F.silu(sum(padded[:, k : k + x.shape[1]] * weight[:, k] for k in range(weight.shape[1])))


@pytest.mark.parametrize("taps", [3, 5])
def test_agrees_with_the_oracle_where_work_is_split(backend, taps):
    """With more channels and steps than a block of threads handles, and numbers of taps without a special kernel."""
    arguments = inputs(2, 150, 140, taps)
    exact = [each.detach().double().requires_grad_() for each in arguments]
    found, expected = with_gradients(conv1d_silu, arguments), with_gradients(_differentiable_oracle, exact)
    assert all(relative_rms(ours, truth) <= 1e-5 for ours, truth in zip(found, expected, strict=True))


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("float64_backend", backends(OPERATOR, float64=True))
def test_gradients_are_right(float64_backend, taps, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, float64_backend)
    assert torch.autograd.gradcheck(conv1d_silu, inputs(1, 5, 2, taps, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_is_registered_properly(backend, dtype):
    x, weight = inputs(dtype=dtype)
    torch.library.opcheck(torch.ops.vision_kernels.conv1d_silu, (x, weight))
    plain = (x.detach().clone(), x.detach(), weight.detach())
    torch.library.opcheck(torch.ops.vision_kernels.conv1d_silu_backward, plain)


def test_any_strides_no_leaks_and_empty_batches(backend, monkeypatch):
    x, weight = inputs(length=33)
    expected = with_gradients(conv1d_silu, (x, weight))
    strided = [each.detach().transpose(0, -1).contiguous().transpose(0, -1) for each in (x, weight)]
    part = torch.cat([x.detach(), x.detach()], dim=2)[:, :, :6]  # half of a wider tensor, as in the mixer
    for arguments in (strided, (part, weight)):
        for ours, theirs in zip(with_gradients(conv1d_silu, arguments), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    y, *grads = with_gradients(conv1d_silu, (x[:0], weight))
    assert y.shape == (0, 33, 6)
    assert not grads[1].any()
    poison_unwritten_memory(monkeypatch)
    for ours, theirs in zip(with_gradients(conv1d_silu, (x, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiles_into_one_graph(backend):
    x, weight = inputs()
    compiled = torch.compile(lambda *each: conv1d_silu(*each).sin(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), conv1d_silu(x, weight).sin())
    compiled(x, weight).sum().backward()


def test_operations_are_counted():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        conv1d_silu(*inputs()).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 7 * 6) * 3


def test_wrong_arguments_are_named():
    x, weight = inputs()
    with pytest.raises(ValueError, match=r"weight has shape \(5, 3\), expected \(6, 3\) to go with x \(2, 7, 6\)"):
        conv1d_silu(x, weight[:5])
    with pytest.raises(ValueError, match=r"weight has shape \(6, 0\), expected \(6, 1\)"):
        conv1d_silu(x, weight[:, :0])
    with pytest.raises(ValueError, match=r"x must be \(batch, length, dim\), got shape \(7, 6\)"):
        conv1d_silu(x[0], weight)
    with pytest.raises(ValueError, match="weight must be a real floating-point tensor"):
        conv1d_silu(x, weight.long())
