"""Forward-mode derivatives of every registered operator: right, or refused."""

import pytest
import test_conv1d_silu as convolution
import test_mamba_mixer as mixing
import test_neighborhood_attention as attention
import test_selective_scan as scanning
import test_ss2d as images
import torch
from torch.autograd import forward_ad

from vision_kernels.registration import _in_forward_mode

F64 = torch.float64


def case(name):
    """Return arguments of the operator, in float64."""
    scan = [*scanning.inputs(dtype=F64), False]
    image = [*images.projected(*images.inputs(dtype=F64)), "cross"]
    window = [*attention.inputs(dtype=F64), 3, 2]
    arguments = {
        "selective_scan": [*scan, F64],
        "selective_scan_backward": [scan[0], *scan],
        "ss2d": [*image, F64],
        "ss2d_backward": [image[0], *image],
        "neighborhood_attention": window,
        "neighborhood_attention_backward": [window[0], *window],
        "conv1d_silu": convolution.inputs(dtype=F64),
        "conv1d_silu_backward": [convolution.inputs(dtype=F64)[0], *convolution.inputs(dtype=F64)],
        "cross_scan": [torch.randn(2, 3, 4, 5, dtype=F64), "cross"],
        "cross_merge": [torch.randn(2, 4, 3, 20, dtype=F64), 4, 5, "cross"],
        "mamba_mixer": [each.double() for each in mixing.inputs()],
    }[name]
    return [each.detach() if isinstance(each, torch.Tensor) else each for each in arguments]


def test_every_operator_has_a_case():
    registered = {
        name.removeprefix("vision_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vision_kernels::")
    }
    assert registered == set(_in_forward_mode)
    for name in registered:
        case(name)


FORWARD = sorted(name for name in _in_forward_mode if not name.endswith("_backward"))
BACKWARD = sorted(set(_in_forward_mode) - set(FORWARD))


def along(name, index):
    """Return the operator as a function of argument `index`, that argument, a tangent, and the true derivative."""
    arguments, operator = case(name), getattr(torch.ops.vision_kernels, name)

    def function(tensor):
        return operator(*arguments[:index], tensor, *arguments[index + 1 :])

    at, step = arguments[index], 1e-6
    tangent = torch.randn_like(at)
    return function, at, tangent, (function(at + step * tangent) - function(at - step * tangent)) / (2 * step)


def tensors_of(names):
    return [(name, i) for name in names for i, each in enumerate(case(name)) if isinstance(each, torch.Tensor)]


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
def test_derivative_is_right_in_graphs_and_with_others(name):
    function, at, tangent, expected = along(name, 0)
    compiled = torch.compile(lambda *each: torch.func.jvp(function, each[:1], each[1:])[1], backend="aot_eager")
    torch.testing.assert_close(compiled(at, tangent), expected, rtol=1e-6, atol=1e-6)
    pair = torch.stack([tangent, -2 * tangent])
    both = torch.vmap(lambda each: torch.func.jvp(function, (at,), (each,))[1])(pair)
    torch.testing.assert_close(both, torch.stack([expected, -2 * expected]), rtol=1e-6, atol=1e-6)
    leaf = at.clone().requires_grad_()  # whose gradient is asked for too
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(leaf, tangent))).tangent
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "index"), tensors_of(BACKWARD))
def test_derivatives_of_gradients_are_refused(name, index):
    arguments = case(name)
    with forward_ad.dual_level():
        arguments[index] = forward_ad.make_dual(arguments[index], torch.ones_like(arguments[index]))
        with pytest.raises(RuntimeError, match="differentiated once, not twice"):
            getattr(torch.ops.vision_kernels, name)(*arguments)
