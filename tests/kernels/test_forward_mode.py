"""Derivatives other than those that training takes: right, or refused, and never silently zero."""

import pytest
import torch
from samples import SIZES, registered, sample
from torch.autograd import forward_ad

_STEP = 1e-6


def _differentiable(name):
    """Return an operator as a function of its tensors alone, these, and directions, all in float64."""
    arguments = sample(name, torch.float64)
    at = [position for position, each in enumerate(arguments) if isinstance(each, torch.Tensor)]

    def function(*tensors):
        changed = list(arguments)
        for position, tensor in zip(at, tensors, strict=True):
            changed[position] = tensor
        return getattr(torch.ops.vision_kernels, name)(*changed)

    tensors = tuple(arguments[position] for position in at)
    torch.manual_seed(1)
    return function, tensors, tuple(torch.randn_like(each) for each in tensors)


def _difference(function, tensors, tangents):
    """Return the central difference, by the compiled or plain kernels rather than the composition."""
    ahead, behind = (
        function(*(each + step * tangent for each, tangent in zip(tensors, tangents, strict=True)))
        for step in (_STEP, -_STEP)
    )
    return (ahead - behind) / (2 * _STEP)


def _assert_close(found, expected):
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_forward_mode_is_right(name):
    function, tensors, tangents = _differentiable(name)
    expected = _difference(function, tensors, tangents)
    value, found = torch.func.jvp(function, tensors, tangents)
    torch.testing.assert_close(value, function(*tensors))
    _assert_close(found, expected)
    with torch.no_grad():
        _assert_close(torch.func.jvp(function, tensors, tangents)[1], expected)
    _assert_close(torch.func.linearize(function, *tensors)[1](*tangents), expected)
    batches = torch.vmap(lambda *each: torch.func.jvp(function, tensors, each)[1])(
        *(torch.stack([tangent, -2 * tangent]) for tangent in tangents)
    )
    _assert_close(batches[1], -2 * expected)


@pytest.mark.parametrize("name", SIZES)
def test_any_input_may_have_the_tangent(name):
    function, tensors, tangents = _differentiable(name)
    for index, tangent in enumerate(tangents):
        only = [torch.zeros_like(each) for each in tensors]
        only[index] = tangent
        with forward_ad.dual_level():
            duals = [each.clone().requires_grad_() for each in tensors]
            duals[index] = forward_ad.make_dual(duals[index], tangent)
            found = forward_ad.unpack_dual(function(*duals)).tangent
        _assert_close(found.detach(), _difference(function, tensors, only))


@pytest.mark.parametrize("name", [each for each in SIZES if each != "mamba_mixer"])
def test_jacobians_agree(name):
    function, tensors, _ = _differentiable(name)
    forward = torch.func.jacfwd(function)(*tensors)
    reverse = torch.autograd.functional.jacobian(lambda first: function(first, *tensors[1:]), tensors[0])
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("name", SIZES)
def test_second_derivatives_in_forward_mode_are_right(name):
    function, (first, *others), (tangent, *_) = _differentiable(name)

    def along(x):
        return torch.func.jvp(lambda x: function(x, *others).pow(2).sum(), (x,), (tangent,))[1]

    found = torch.func.jvp(along, (first,), (tangent,))[1]
    _assert_close(found, (along(first + _STEP * tangent) - along(first - _STEP * tangent)) / (2 * _STEP))


@pytest.mark.parametrize("name", registered())
def test_batches_by_vmap_are_right(name):
    function, tensors, _ = _differentiable(name)
    found = torch.vmap(function)(*(torch.stack([each, each.flip(0)]) for each in tensors))
    expected = function(*(each.flip(0) for each in tensors))
    for one, other in zip(
        *((each,) if isinstance(each, torch.Tensor) else each for each in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one[1], other)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
@pytest.mark.parametrize("name", registered())
def test_reverse_mode_of_functorch_is_refused(name, transform):
    function, tensors, _ = _differentiable(name)

    def loss(*tensors):
        results = function(*tensors)
        return (results if isinstance(results, torch.Tensor) else results[0]).sum()

    with pytest.raises(RuntimeError, match=r"functorch transforms|differentiated once"):
        transform(loss)(*tensors)


@pytest.mark.parametrize("name", [each for each in registered() if each.endswith("_backward")])
def test_derivatives_of_gradients_are_refused(name):
    function, tensors, tangents = _differentiable(name)
    with pytest.raises(RuntimeError, match="can be differentiated once, not twice"):
        torch.func.jvp(function, tensors, tangents)
