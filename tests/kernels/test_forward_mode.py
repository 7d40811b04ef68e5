"""Forward-mode derivatives of every registered operator: right, or refused."""

import pytest
import torch
from samples import registered, sample
from torch.autograd import forward_ad

from vision_kernels.registration import _in_forward_mode

F64 = torch.float64


def test_every_operator_has_a_forward_mode():
    assert set(registered()) == set(_in_forward_mode)


FORWARD = [name for name in registered() if not name.endswith("_backward")]
BACKWARD = [name for name in registered() if name.endswith("_backward")]


def along(name, index):
    """Return the operator as a function of argument `index`, that argument, a tangent, and the true derivative."""
    arguments, operator = sample(name, F64), getattr(torch.ops.vision_kernels, name)

    def function(tensor):
        return operator(*arguments[:index], tensor, *arguments[index + 1 :])

    at, step = arguments[index], 1e-6
    tangent = torch.randn_like(at)
    return function, at, tangent, (function(at + step * tangent) - function(at - step * tangent)) / (2 * step)


def tensors_of(names):
    return [(name, i) for name in names for i, each in enumerate(sample(name, F64)) if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize(("name", "index"), tensors_of(FORWARD))
def test_derivative_by_each_argument_is_right(name, index):
    function, at, tangent, expected = along(name, index)
    y, found = torch.func.jvp(function, (at,), (tangent,))
    torch.testing.assert_close(y, function(at))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(at, tangent))).tangent
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORWARD)
def test_derivative_is_right_in_graphs_and_with_other_transforms(name):
    function, at, tangent, expected = along(name, 0)
    compiled = torch.compile(lambda *each: torch.func.jvp(function, each[:1], each[1:])[1], backend="aot_eager")
    torch.testing.assert_close(compiled(at, tangent), expected, rtol=1e-6, atol=1e-6)
    pair = torch.stack([tangent, -2 * tangent])
    both = torch.vmap(lambda each: torch.func.jvp(function, (at,), (each,))[1])(pair)
    torch.testing.assert_close(both, torch.stack([expected, -2 * expected]), rtol=1e-6, atol=1e-6)
    leaf = at.clone().requires_grad_()  # its gradient is requested too
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(leaf, tangent))).tangent
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "index"), tensors_of(BACKWARD))
def test_derivatives_of_gradients_are_refused(name, index):
    arguments = sample(name, F64)
    with forward_ad.dual_level():
        arguments[index] = forward_ad.make_dual(arguments[index], torch.ones_like(arguments[index]))
        with pytest.raises(RuntimeError, match="differentiated once, not twice"):
            getattr(torch.ops.vision_kernels, name)(*arguments)
