"""Conformance of every selective-scan backend; new backends are tested automatically."""

import importlib
import shutil

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

from conformance import COMPUTING_FLOAT64, backends, force, poison_unwritten_memory, relative_rms
from emulation import BACKEND
from parity import DATA
from vision_kernels import selective_scan
from vision_kernels.backends import BACKEND_VARIABLE
from vision_kernels.selective_scan.op import OPERATOR

# The package's attribute of this name is the function, so modules below it are found by name.
torch_scan = importlib.import_module("vision_kernels.selective_scan.torch_scan")

LENGTHS = (0, 1, 2, 7, 31, 32, 33, 196, 197)
TENSORS = ("u", "delta", "A", "B", "C", "D", "delta_bias")


@pytest.fixture(params=backends(OPERATOR))
def backend(request, monkeypatch):
    return force(request.param, monkeypatch, OPERATOR)


@pytest.fixture(params=backends(OPERATOR, float64=True))
def precise_backend(request, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, request.param)


@pytest.fixture(params=[1 << 18, 50], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Set the blocks of the plain PyTorch scan; with small ones short sequences cross block boundaries."""
    monkeypatch.setitem(torch_scan._BLOCK_ELEMENTS, "cpu", request.param)


def inputs(batch=2, dim=6, length=7, state=3, groups=2, dtype=torch.float32, optional=True, softplus=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    A = (-torch.rand(dim, state, generator=generator, dtype=torch.float64) - 0.2).to(dtype).requires_grad_()
    tensors = [normal(batch, dim, length), normal(batch, dim, length), A]
    tensors += [normal(batch, groups, state, length), normal(batch, groups, state, length)]
    return [*tensors, normal(dim) if optional else None, normal(dim) if optional else None, softplus]


def with_gradients(arguments, weights):
    leaves = [each.detach().requires_grad_() if isinstance(each, torch.Tensor) else each for each in arguments]
    y = selective_scan(*leaves)
    (y.double() * weights).sum().backward()
    return [y.detach()] + [leaf.grad for leaf in leaves if isinstance(leaf, torch.Tensor)]


def oracle(arguments, weights):
    """Return the same as `with_gradients` by a loop over time in float64, written with other operations."""
    leaves = [each.detach().double().requires_grad_() if isinstance(each, torch.Tensor) else each for each in arguments]
    u, delta, A, B, C, D, bias, softplus = leaves
    delta = delta if bias is None else delta + bias.view(1, -1, 1)
    delta = torch.nn.functional.softplus(delta) if softplus else delta
    share = u.shape[1] // B.shape[1]
    state, outputs = torch.zeros(*u.shape[:2], A.shape[1], dtype=torch.float64), []
    for t in range(u.shape[2]):
        b, c = (each[..., t].unsqueeze(2).expand(-1, -1, share, -1).flatten(1, 2) for each in (B, C))
        step = delta[..., t : t + 1]
        state = (step * A).exp() * state + step * b * u[..., t : t + 1]
        outputs.append(torch.einsum("bdn,bdn->bd", c, state))
    y = torch.stack(outputs, -1) if outputs else u * 0
    y = y if D is None else y + D.view(1, -1, 1) * u
    (y * weights).sum().backward()
    zero = [
        torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves if isinstance(leaf, torch.Tensor)
    ]
    return [y.detach(), *zero]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_agrees_with_a_float64_oracle(backend, length, dtype):
    arguments = inputs(length=length, dtype=dtype, seed=length)
    weights = torch.randn(arguments[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    forward, gradient = (1e-5, 1e-4) if dtype == torch.float32 else (5e-3, 1e-2)
    found, expected = with_gradients(arguments, weights), oracle(arguments, weights)
    for name, ours, truth in zip(("y", *TENSORS), found, expected, strict=True):
        assert relative_rms(ours, truth) <= (forward if name == "y" else gradient), name
    assert [each.dtype for each in found] == [dtype] * len(found)


# Channels that fill vectors or do not; states in groups of eight and four; sequences of several chunks; split groups.
@pytest.mark.parametrize(
    ("dim", "length", "state", "groups"), [(40, 70, 13, 1), (150, 33, 8, 2), (17, 600, 16, 1), (96, 1200, 1, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_the_oracle_at_other_sizes(backend, dim, length, state, groups, dtype):
    if backend == "reference" and length > 100:
        pytest.skip("slow, and the same code for every size")
    arguments = inputs(2, dim, length, state, groups, dtype)
    weights = torch.randn(arguments[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    forward, gradient = (1e-5, 1e-4) if dtype == torch.float32 else (5e-3, 1e-2)
    found, expected = with_gradients(arguments, weights), oracle(arguments, weights)
    for name, ours, truth in zip(("y", *TENSORS), found, expected, strict=True):
        assert relative_rms(ours, truth) <= (forward if name == "y" else gradient), name


def in_channels_last(arguments):
    return [
        each.detach().movedim(-1, 1).contiguous().requires_grad_()
        if isinstance(each, torch.Tensor) and each.ndim > 2
        else each
        for each in arguments
    ]


def test_channels_may_be_last(backend):
    arguments = [each.detach() if isinstance(each, torch.Tensor) else each for each in inputs(dim=40, length=35)]
    first = [each.requires_grad_() if isinstance(each, torch.Tensor) else each for each in arguments]
    last = in_channels_last(arguments)
    last = [each.detach().requires_grad_() if isinstance(each, torch.Tensor) else each for each in last]
    y, same = selective_scan(*first), selective_scan(*last, channels_last=True)
    assert same.is_contiguous()
    torch.testing.assert_close(same.transpose(1, 2), y)
    y.square().sum().backward()
    same.square().sum().backward()
    for ours, theirs in zip(last[:7], first[:7], strict=True):
        grad = ours.grad.movedim(1, -1) if ours.ndim > 2 else ours.grad
        torch.testing.assert_close(grad, theirs.grad, rtol=1e-4, atol=1e-4)


# There are special kernels for the layout of models in mixed precision, and for many sequences.
@pytest.mark.parametrize(
    ("batch", "dim", "length", "state", "dtype"),
    [
        (2, 40, 35, 1, torch.bfloat16),
        (2, 40, 35, 8, torch.float16),
        (2, 40, 35, 13, torch.bfloat16),
        (512, 4, 18, 7, torch.bfloat16),
    ],
)
def test_adjacent_channels_in_half_precision(backend, batch, dim, length, state, dtype):
    arguments = inputs(batch, dim, length, state, 1, dtype)
    y = selective_scan(*in_channels_last(arguments), channels_last=True)
    weights = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1))
    expected = oracle(arguments, weights.double())
    assert relative_rms(y.transpose(1, 2), expected[0]) <= 5e-3
    last = in_channels_last(arguments)
    selective_scan(*last, channels_last=True).backward(weights.transpose(1, 2).to(dtype))
    for name, ours, truth in zip(TENSORS, last, expected[1:], strict=False):
        grad = ours.grad.movedim(1, -1) if ours.ndim > 2 else ours.grad
        assert relative_rms(grad, truth) <= 1e-2, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequences_may_be_transposed_views(backend, dtype):
    """Inputs and gradients are views of channels-last memory, but channels_last=False."""
    arguments = inputs(dim=36, length=21, state=8, groups=1, dtype=dtype)
    turned = [
        each.detach().movedim(-1, 1).contiguous().movedim(1, -1).requires_grad_()
        if isinstance(each, torch.Tensor) and each.ndim > 2
        else each
        for each in arguments
    ]
    y, same = selective_scan(*arguments), selective_scan(*turned)
    grad = torch.randn(2, 21, 36, dtype=dtype).transpose(1, 2)
    tensors = [[each for each in side if isinstance(each, torch.Tensor)] for side in (arguments, turned)]
    expected = torch.autograd.grad(y, tensors[0], grad.contiguous())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, truth in zip([same, *torch.autograd.grad(same, tensors[1], grad)], [y, *expected], strict=True):
        assert relative_rms(ours, truth) < tolerance


def test_output_may_have_another_dtype(backend):
    arguments = inputs(dtype=torch.bfloat16, length=33)
    y = selective_scan(*arguments, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    exact = selective_scan(*[each.float() if isinstance(each, torch.Tensor) else each for each in arguments])
    assert relative_rms(y, exact) < 1e-5
    y.sum().backward()
    assert arguments[0].grad.dtype == torch.bfloat16
    assert selective_scan(*inputs(), out_dtype=torch.bfloat16).dtype == torch.bfloat16
    y = selective_scan(*inputs(), out_dtype=torch.float64)
    assert y.dtype == torch.float64
    y.sum().backward()


def test_channels_may_share_step_sizes(backend):
    u, delta, A, B, C, D, bias, softplus = inputs(dim=6)
    shared = selective_scan(u, delta[:, :2], A, B, C, D, bias[:2], softplus)
    repeated = selective_scan(u, delta[:, [0, 0, 0, 1, 1, 1]], A, B, C, D, bias[[0, 0, 0, 1, 1, 1]], softplus)
    torch.testing.assert_close(shared, repeated)
    with pytest.raises(ValueError, match=r"dim 6 of u does not divide into the 4 groups of delta \(2, 4, 7\)"):
        selective_scan(u, delta[:, :4], A, B, C)


def test_result_does_not_depend_on_the_number_of_threads(backend):
    arguments = inputs(dim=70, length=50)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(with_gradients(arguments, 1.0))
    torch.set_num_threads(threads)
    if backend not in COMPUTING_FLOAT64:
        assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_agrees_with_recorded_numbers(backend):
    recorded = {name: torch.from_numpy(array) for name, array in np.load(DATA / "kernels/selective_scan.npz").items()}
    dtype, tolerance = (torch.float32, 2e-6) if backend not in COMPUTING_FLOAT64 else (torch.float64, 1e-13)
    arguments = [recorded[name].to(dtype).requires_grad_() for name in TENSORS]
    y = selective_scan(*arguments, delta_softplus=True)
    (y * recorded["w"]).sum().backward()
    assert relative_rms(y.detach(), recorded["out"]) < tolerance
    for name, argument in zip(TENSORS, arguments, strict=True):
        assert relative_rms(argument.grad, recorded[f"d_{name}"]) < tolerance, name


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 11])
def test_gradients_are_right(precise_backend, length, optional, softplus, groups):
    arguments = inputs(1, 3, length, 2, groups, torch.float64, optional, softplus)
    assert torch.autograd.gradcheck(selective_scan, arguments)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_operator_is_registered_properly(backend, channels_last, optional, dtype):
    arguments = inputs(dtype=dtype, optional=optional)
    arguments = [*(in_channels_last(arguments) if channels_last else arguments), channels_last]
    operators = torch.ops.vision_kernels
    torch.library.opcheck(operators.selective_scan, [*arguments, torch.float32])
    plain = [each.detach() if isinstance(each, torch.Tensor) else each for each in arguments]
    torch.library.opcheck(operators.selective_scan_backward, [torch.randn_like(plain[0]), *plain])


def test_every_input_may_have_any_strides(backend):
    """The fake kernel promises contiguous outputs, and compiled code relies on that; opcheck does not check it."""
    arguments = inputs()
    expected = with_gradients(arguments, 1.0)
    strided = [
        each.detach().transpose(0, -1).contiguous().transpose(0, -1) if isinstance(each, torch.Tensor) else each
        for each in arguments
    ]
    found = with_gradients(strided, 1.0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = [each.detach() if isinstance(each, torch.Tensor) else each for each in strided]
    operators = torch.ops.vision_kernels
    y = operators.selective_scan(*plain, False, torch.float32)
    assert all(each.is_contiguous() for each in (y, *operators.selective_scan_backward(plain[0], *plain, False)))
    expanded = inputs()
    expanded[3] = expanded[3][:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(selective_scan(*expanded), selective_scan(*[_contiguous(each) for each in expanded]))


def _contiguous(each):
    return each.contiguous() if isinstance(each, torch.Tensor) else each


def test_compiles_into_one_graph(backend):
    arguments = inputs()
    compiled = torch.compile(lambda *each: selective_scan(*each).sin(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), selective_scan(*arguments).sin())
    compiled(*arguments).sum().backward()


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiles_with_generated_code_around_it():
    arguments = inputs()

    def between_others(u, delta, *others):
        return (
            selective_scan(u.cos(), delta.transpose(1, 2).contiguous().transpose(1, 2), *others).transpose(1, 2).sin()
        )

    found, expected = torch.compile(between_others, fullgraph=True)(*arguments), between_others(*arguments)
    torch.testing.assert_close(found, expected)
    found.sum().backward()


def test_unwritten_memory_does_not_leak(backend, monkeypatch):
    arguments, weights = inputs(length=33), 1.0
    expected = with_gradients(arguments, weights)
    poison_unwritten_memory(monkeypatch)
    for ours, theirs in zip(with_gradients(arguments, weights), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_steps_give_finite_results(backend, extreme):
    arguments = inputs(length=33)
    arguments[1] = torch.full_like(arguments[1], extreme, requires_grad=True)
    assert all(each.isfinite().all() for each in with_gradients(arguments, 1e-3))


def test_zero_decay_sums_up(backend):
    u, delta, B = torch.ones(1, 2, 5), torch.full((1, 2, 5), 0.5), torch.ones(1, 1, 5)
    y = selective_scan(u, delta, torch.zeros(2, 1), B, B)
    torch.testing.assert_close(y, torch.arange(1.0, 6.0).mul(0.5).expand(1, 2, 5))


lengths, seeds = strategies.integers(1, 20), strategies.integers(0, 2**16)
shared_fixtures = hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@shared_fixtures
@hypothesis.given(length=lengths, seed=seeds, factor=strategies.floats(-3, 3))
def test_is_linear_in_the_input(backend, length, seed, factor):
    u, *others = inputs(length=length, seed=seed)
    v = torch.randn(u.shape, generator=torch.Generator().manual_seed(seed + 1))
    together = selective_scan(u + factor * v, *others)
    expected = selective_scan(u, *others) + factor * selective_scan(v, *others)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-3)


@shared_fixtures
@hypothesis.given(length=strategies.integers(2, 20), seed=seeds, data=strategies.data())
def test_is_causal(backend, length, seed, data):
    arguments = inputs(length=length, seed=seed)
    cut = data.draw(strategies.integers(1, length - 1))
    head = [each[..., :cut] if index in (0, 1, 3, 4) else each for index, each in enumerate(arguments)]
    torch.testing.assert_close(selective_scan(*arguments)[..., :cut], selective_scan(*head))


@shared_fixtures
@hypothesis.given(seed=seeds, order=strategies.permutations(range(4)))
def test_batch_entries_do_not_mix(backend, seed, order):
    arguments = inputs(batch=4, seed=seed)
    permuted = [each[order] if index in (0, 1, 3, 4) else each for index, each in enumerate(arguments)]
    torch.testing.assert_close(selective_scan(*permuted), selective_scan(*arguments)[order])


def test_groups_may_be_left_out():
    arguments = inputs(groups=1)
    without = [each.squeeze(1) if index in (3, 4) else each for index, each in enumerate(arguments)]
    torch.testing.assert_close(selective_scan(*without), selective_scan(*arguments))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (2, 6)),
        ("delta", (2, 6, 8)),
        ("A", (5, 3)),
        ("A", (6,)),
        ("B", (2, 2, 4, 7)),
        ("B", (2, 4, 3, 7)),
        ("B", (7,)),
        ("C", (1, 2, 3, 7)),
        ("D", (5,)),
        ("delta_bias", (6, 1)),
    ],
)
def test_wrong_shapes_are_named(name, shape):
    arguments = dict(zip(TENSORS, inputs(), strict=False)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"selective_scan: .*" + name.split("_")[0]) as error:
        selective_scan(**arguments)
    assert str(tuple(shape)) in str(error.value)


def test_wrong_types_and_devices_are_named():
    u, *others, softplus = inputs()
    with pytest.raises(ValueError, match=r"delta must be a real floating-point tensor, got torch\.int64"):
        selective_scan(u, others[0].long(), *others[1:], softplus)
    with pytest.raises(ValueError, match=r"A must be a real floating-point tensor, got torch\.complex64"):
        selective_scan(u, others[0], others[1].to(torch.complex64), *others[2:], softplus)
    with pytest.raises(ValueError, match="delta is on meta, u is on cpu"):
        selective_scan(u, others[0].to("meta"), *others[1:], softplus)


def test_compiled_kernels_refuse_float64_when_forced(backend):
    if backend in COMPUTING_FLOAT64:
        selective_scan(*inputs(dtype=torch.float64))
        return
    with pytest.raises(ValueError, match=f"selective_scan={backend}: computes in float32, and an input is float64"):
        selective_scan(*inputs(dtype=torch.float64))


def test_more_states_than_registers_are_refused_when_forced(backend):
    arguments = inputs(length=3, state=17)
    if backend != BACKEND:
        selective_scan(*arguments)
        return
    with pytest.raises(ValueError, match="has registers for 1 to 16 states, and A has 17"):
        selective_scan(*arguments)
