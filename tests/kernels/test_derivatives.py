"""Transforms of torch.func and second derivatives: right values or an error, never silent zeros.

Forward mode is tested in test_forward_mode.py.
"""

import pytest
import torch
from samples import registered, sample
from torch import Tensor

FORWARD = [name for name in registered() if not name.endswith("_backward")]
# The fused mixer has no gradient of its own: `vision_kernels.mamba_mixer` is composed if one is needed.
WITH_GRADIENT = [name for name in FORWARD if name != "mamba_mixer"]


def prepared(name):
    """Return a function of an operator's tensors, and these, in float64."""
    torch.manual_seed(0)
    arguments = sample(name, torch.float64)
    places = [at for at, each in enumerate(arguments) if isinstance(each, Tensor)]

    def call(*tensors):
        given = list(arguments)
        for at, tensor in zip(places, tensors, strict=True):
            given[at] = tensor
        return getattr(torch.ops.vision_kernels, name)(*given)

    return call, [arguments[at].double() for at in places]


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_functional_gradients_are_right_or_refused(name):
    call, tensors = prepared(name)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    places = tuple(range(len(tensors)))
    for transform in (torch.func.grad, torch.func.jacrev):
        try:
            found = transform(lambda *each: call(*each).square().sum(), argnums=places)(*tensors)
        except RuntimeError as refused:
            assert str(refused)  # noqa: PT017
        else:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_second_derivatives_are_right_or_refused(name):
    call, tensors = prepared(name)
    tensors[0].requires_grad_()
    (gradient,) = torch.autograd.grad(call(*tensors).square().sum(), tensors[0], create_graph=True)
    try:
        (found,) = torch.autograd.grad(gradient.sum(), tensors[0])
    except RuntimeError as refused:
        message = str(refused)
        assert "differentiated once, not twice" in message
    else:
        assert name in ("cross_scan", "cross_merge")  # linear, each the gradient of the other
        assert found.equal(torch.full_like(found, 8.0))  # four routes, squared


@pytest.mark.parametrize("name", FORWARD)
def test_batches_of_vmap_are_right_or_refused(name):
    call, (first, *others) = prepared(name)
    several = torch.stack((first, first * 0.5, first * 2))
    expected = torch.stack([call(each, *others) for each in several])
    try:
        found = torch.func.vmap(lambda each: call(each, *others))(several)
    except RuntimeError as refused:
        assert str(refused)  # noqa: PT017
    else:
        torch.testing.assert_close(found, expected)
