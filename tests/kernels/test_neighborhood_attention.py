"""Conformance of every neighborhood-attention backend; new backends are tested automatically."""

import importlib

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

import emulation
from conformance import COMPUTING_FLOAT64, backends, force, poison_unwritten_memory, relative_rms
from parity import DATA
from vision_kernels import neighborhood_attention
from vision_kernels.backends import BACKEND_VARIABLE
from vision_kernels.neighborhood_attention.op import OPERATOR

# The package's attribute of this name is the function, so modules below it are found by name.
torch_attention = importlib.import_module("vision_kernels.neighborhood_attention.torch_attention")

NAMES = ("query", "key", "value", "bias")
# (height, width), kernel size, dilation, head_dim: around the edges of tiles, groups and vectors
CASES = [
    ((3, 3), 3, 1, 20),
    ((3, 4), 3, 1, 24),
    ((7, 7), 7, 1, 28),
    ((7, 8), 7, 1, 32),
    ((11, 12), 11, 1, 36),
    ((13, 13), 13, 1, 20),
    ((13, 14), 13, 1, 7),
    ((17, 31), 7, 1, 24),
    ((31, 33), 11, 1, 32),
    ((33, 17), 9, 1, 1),
    ((13, 7), 1, 1, 5),
    ((16, 70), 5, 1, 12),
    ((50, 7), 3, 1, 4),
    ((5, 98), 3, 1, 4),
    ((7, 13), 3, 2, 20),
    ((10, 9), 3, 3, 36),
    ((17, 15), 5, 3, 8),
]


@pytest.fixture(params=backends(OPERATOR))
def backend(request, monkeypatch):
    return force(request.param, monkeypatch, OPERATOR)


@pytest.fixture(params=[1 << 20, 1], ids=["large chunks", "small chunks"])
def chunks(request, monkeypatch):
    """Set the chunks of the plain PyTorch version; small ones process batch entries one by one."""
    monkeypatch.setitem(torch_attention._CHUNK_ELEMENTS, "cpu", request.param)


def precise_dtype(backend):
    """Return float64 if the backend computes in it, otherwise float32."""
    return torch.float32 if backend not in COMPUTING_FLOAT64 else torch.float64


def inputs(size=(7, 9), kernel_size=3, dim=6, batch=2, heads=2, dtype=torch.float32, with_bias=True, seed=0):
    """Return query, key, value and bias. The logits are of the order of 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    shape, side = (batch, heads, *size, dim), 2 * kernel_size - 1
    maps = [normal(*shape, scale=dim**-0.5), normal(*shape), normal(*shape)]
    return [*maps, normal(heads, side, side) if with_bias else None]


def with_gradients(tensors, weights, kernel_size, dilation=1):
    leaves = [None if each is None else each.detach().requires_grad_() for each in tensors]
    out = neighborhood_attention(*leaves[:3], kernel_size, dilation, leaves[3])
    (out * weights).to(torch.float64).sum().backward()
    return [out.detach()] + [leaf.grad for leaf in leaves if leaf is not None]


def seen(size, kernel_size, dilation):
    """Return whether position i of an axis sees position j, and the index into the bias table, by the definition."""
    i, j = torch.arange(size)[:, None], torch.arange(size)
    members = (size - 1 - i % dilation) // dilation + 1  # with the same residue as i
    radius = kernel_size // 2
    center = torch.minimum((i // dilation).clamp(min=radius), members - 1 - radius)
    inside = (i % dilation == j % dilation) & ((j // dilation - center).abs() <= radius)
    return inside, torch.where(inside, torch.div(j - i, dilation, rounding_mode="trunc") + kernel_size - 1, 0)


def dense_attention(query, key, value, bias, kernel_size, dilation):
    """Return dense attention with a mask for positions outside the window."""
    (height, width), positions = query.shape[2:4], query.shape[2] * query.shape[3]
    (rows, row_bias), (columns, column_bias) = (seen(size, kernel_size, dilation) for size in (height, width))
    logits = query.flatten(2, 3) @ key.flatten(2, 3).transpose(-1, -2)
    if bias is not None:
        table = bias[:, row_bias[:, None, :, None], column_bias[None, :, None, :]]
        logits = logits + table.reshape(-1, positions, positions)
    mask = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(positions, positions)
    return (logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value.flatten(2, 3)).view_as(query)


def oracle(tensors, weights, kernel_size, dilation=1):
    leaves = [None if each is None else each.detach().double().requires_grad_() for each in tensors]
    out = dense_attention(*leaves, kernel_size, dilation)
    (out * weights).sum().backward()
    return [out.detach()] + [leaf.grad for leaf in leaves if leaf is not None]


def assert_close_to_oracle(tensors, kernel_size, dilation):
    dtype = tensors[0].dtype
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(tensors[0].shape, dtype=torch.float64, generator=generator).to(dtype)
    found = with_gradients(tensors, weights, kernel_size, dilation)
    expected = oracle(tensors, weights.double(), kernel_size, dilation)
    forward, gradient = (1e-5, 1e-4) if dtype == torch.float32 else (5e-3, 1e-2)
    for name, ours, truth in zip(("out", *NAMES), found, expected, strict=False):
        # A window of one position has the weight 1 for any logits.
        limit = (forward if name == "out" else gradient) if truth.abs().max() > 1e-9 else 1e-5 / 1e-12
        assert relative_rms(ours, truth) <= limit, name
    assert [each.dtype for each in found] == [dtype] * len(found)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("size", "kernel_size", "dilation", "dim"), CASES)
def test_agrees_with_a_float64_oracle(backend, size, kernel_size, dilation, dim, with_bias):
    batch = 1 if max(size) > 30 else 2
    tensors = inputs(size, kernel_size, dim, batch=batch, with_bias=with_bias, seed=dim)
    assert_close_to_oracle(tensors, kernel_size, dilation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "kernel_size", "dilation", "dim"), [CASES[3], CASES[4], CASES[7], CASES[13]])
def test_half_precision_agrees_with_a_float64_oracle(backend, size, kernel_size, dilation, dim, dtype):
    assert_close_to_oracle(inputs(size, kernel_size, dim, dtype=dtype, seed=dim), kernel_size, dilation)


@pytest.mark.parametrize("case", ["k9", "k7_square7", "k3_dilation2"])
def test_agrees_with_recorded_numbers(backend, case):
    archive, dtype = np.load(DATA / "kernels" / "neighborhood_attention.npz"), precise_dtype(backend)
    recorded = {name.split("/")[1]: torch.from_numpy(archive[name]) for name in archive if name.startswith(case + "/")}
    kernel_size, dilation = recorded["kernel_dilation"].tolist()
    tensors = [recorded[name].to(dtype) for name in ("q", "k", "v", "rpb")]
    found = with_gradients(tensors, recorded["grad_out"].to(dtype), kernel_size, dilation)
    for name, ours in zip(("out", "grad_q", "grad_k", "grad_v", "grad_rpb"), found, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, recorded[name], rtol=0, atol=1e-12, msg=name)
        else:
            assert relative_rms(ours, recorded[name]) <= 1e-5, name
    if "out_no_rpb" in recorded:
        without_bias = neighborhood_attention(*tensors[:3], kernel_size, dilation)
        assert relative_rms(without_bias, recorded["out_no_rpb"]) <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("size", "dilation"), [((3, 4), 1), ((9, 3), 1), ((6, 7), 2)])
@pytest.mark.parametrize("precise_backend", backends(OPERATOR, float64=True))
def test_gradients_are_right(precise_backend, size, dilation, with_bias, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, precise_backend)
    tensors = inputs(size, 3, 2, with_bias=with_bias, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: neighborhood_attention(q, k, v, 3, dilation, b), tensors, fast_mode=True
    )


@pytest.mark.usefixtures("chunks")
def test_batch_entries_do_not_mix(backend):
    tensors, order = inputs(batch=3), [2, 0, 1]
    permuted = [each if index == 3 else each[order] for index, each in enumerate(tensors)]
    found = neighborhood_attention(*permuted[:3], 3, bias=tensors[3])
    torch.testing.assert_close(found, neighborhood_attention(*tensors[:3], 3, bias=tensors[3])[order])


@pytest.mark.parametrize(
    ("dtype", "dilation", "with_bias"),
    [(torch.float32, 1, True), (torch.bfloat16, 1, True), (torch.float32, 2, False)],
    ids=str,
)
def test_operator_is_registered_properly(backend, dtype, dilation, with_bias):
    arguments = [*inputs(dtype=dtype, with_bias=with_bias), 3, dilation]
    operators = torch.ops.vision_kernels
    torch.library.opcheck(operators.neighborhood_attention, arguments)
    plain = [each.detach() if isinstance(each, torch.Tensor) else each for each in arguments]
    torch.library.opcheck(operators.neighborhood_attention_backward, [torch.randn_like(plain[0]), *plain])


@pytest.mark.parametrize("dilation", [1, 2])
def test_every_input_may_have_any_strides(backend, dilation):
    """The fake kernel promises contiguous outputs, and compiled code relies on that; opcheck does not check it."""
    tensors = inputs(dim=9)
    expected = with_gradients(tensors, 1.5, 3, dilation)
    for axes in ((0, -1), (1, 2), (2, -1)):
        strided = [each.detach().transpose(*axes).contiguous().transpose(*axes) for each in tensors]
        for ours, theirs in zip(with_gradients(strided, 1.5, 3, dilation), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        grads = torch.ops.vision_kernels.neighborhood_attention_backward(strided[0], *strided, 3, dilation)
        out = torch.ops.vision_kernels.neighborhood_attention(*strided, 3, dilation)
        assert all(each.is_contiguous() for each in (out, *grads))
    key = tensors[1].detach()[:, :1, :, :, :1].expand_as(tensors[1])
    found = with_gradients([tensors[0], key, *tensors[2:]], 1.0, 3, dilation)
    expected = with_gradients([tensors[0], key.contiguous(), *tensors[2:]], 1.0, 3, dilation)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_inputs_may_have_mixed_dtypes(backend):
    query, key, value, bias = inputs()
    found = with_gradients([query, key.bfloat16(), value.half(), bias], 1.0, 3)
    expected = with_gradients([query, key.bfloat16().float(), value.half().float(), bias], 1.0, 3)
    assert [each.dtype for each in found[1:]] == [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


def test_compiles_into_one_graph(backend):
    query, key, value, bias = inputs()

    def around(query, key, value, bias):
        return neighborhood_attention(query.cos(), key, value, 3, 2, bias).sin()

    compiled = torch.compile(around, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value, bias), around(query, key, value, bias))
    compiled(query, key, value, bias).sum().backward()
    assert all(each.grad.isfinite().all() for each in (query, key, value, bias))


@pytest.mark.parametrize("dilation", [1, 2])
def test_unwritten_memory_does_not_leak(backend, monkeypatch, dilation):
    tensors = inputs((17, 21), 5)
    expected = with_gradients(tensors, 1.0, 5, dilation)
    poison_unwritten_memory(monkeypatch)
    for ours, theirs in zip(with_gradients(tensors, 1.0, 5, dilation), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_result_does_not_depend_on_the_number_of_threads(backend):
    size = (11, 14) if backend == emulation.BACKEND else (35, 70)
    tensors, threads = inputs(size, 5), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(tensors, 1.0, 5))
    finally:
        torch.set_num_threads(threads)
    for ours, theirs in zip(results[0], results[1], strict=True):
        # The BLAS library may sum in another order.
        torch.testing.assert_close(ours, theirs)
    if backend not in COMPUTING_FLOAT64:
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_large_logits_give_finite_results(backend, factor):
    query, *others = inputs()
    assert all(each.isfinite().all() for each in with_gradients([query * factor, *others], 1.0, 3))


def test_nan_stays_within_its_windows(backend):
    tensors = [each.detach().clone() for each in inputs((40, 40), 5)]
    tensors[2][:, :, 0, 0] = float("nan")
    out = neighborhood_attention(*tensors[:3], 5, bias=tensors[3])
    assert out[:, :, :3, :3].isnan().all()
    assert out[:, :, 20:].isfinite().all()
    assert out[:, :, :, 20:].isfinite().all()


shared_fixtures = hypothesis.settings(
    max_examples=15, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@shared_fixtures
@hypothesis.given(radius=strategies.integers(0, 6), dim=strategies.integers(1, 40), seed=strategies.integers(0, 2**16))
def test_window_of_the_whole_map_is_global_attention(backend, radius, dim, seed):
    side = 2 * radius + 1
    query, key, value, _ = (None if each is None else each for each in inputs((side, side), side, dim, seed=seed))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(each.flatten(2, 3) for each in (query, key, value)), scale=1.0
    )
    torch.testing.assert_close(neighborhood_attention(query, key, value, side).flatten(2, 3), expected)


@shared_fixtures
@hypothesis.given(
    size=strategies.tuples(strategies.integers(5, 24), strategies.integers(5, 24)), seed=strategies.integers(0, 2**16)
)
def test_transposed_map_gives_transposed_output(backend, size, seed):
    query, key, value, bias = (each.detach() for each in inputs(size, 5, seed=seed))
    turned = [each.transpose(2, 3) for each in (query, key, value)]
    found = neighborhood_attention(*turned, 5, bias=bias.transpose(1, 2)).transpose(2, 3)
    torch.testing.assert_close(found, neighborhood_attention(query, key, value, 5, bias=bias))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("query", (2, 2, 7, 9)),
        ("key", (2, 2, 7, 8, 6)),
        ("value", (2, 2, 7, 9, 5)),
        ("bias", (2, 5, 6)),
        ("bias", (3, 5, 5)),
    ],
)
def test_wrong_shapes_are_named(name, shape):
    arguments = dict(zip(NAMES, inputs(), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"neighborhood_attention: {name}") as error:
        neighborhood_attention(**arguments, kernel_size=3)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "message"),
    [
        (4, 1, "kernel_size must be odd and at least 1, got 4"),
        (-1, 1, "kernel_size must be odd and at least 1, got -1"),
        (3, 0, "dilation must be at least 1, got 0"),
        (9, 1, r"kernel_size 9 with dilation 1 needs a map of at least \(9, 9\), query \(2, 2, 7, 9, 6\) has \(7, 9\)"),
        (3, 3, r"kernel_size 3 with dilation 3 needs a map of at least \(9, 9\), query \(2, 2, 7, 9, 6\) has \(7, 9\)"),
    ],
)
def test_wrong_windows_are_named(kernel_size, dilation, message):
    query, key, value, _ = inputs()
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(query, key, value, kernel_size, dilation)


def test_wrong_types_and_devices_are_named():
    query, key, value, bias = inputs()
    with pytest.raises(ValueError, match=r"key must be a real floating-point tensor, got torch\.int64"):
        neighborhood_attention(query, key.long(), value, 3)
    with pytest.raises(ValueError, match=r"bias is on meta, query is on cpu"):
        neighborhood_attention(query, key, value, 3, bias=bias.to("meta"))


def test_compiled_kernels_refuse_float64_when_forced(backend):
    query, key, value, _ = inputs(dtype=torch.float64)
    if backend in COMPUTING_FLOAT64:
        neighborhood_attention(query, key, value, 3)
        return
    with pytest.raises(ValueError, match=r"an input is float64|not torch\.float64"):
        neighborhood_attention(query, key, value, 3)


def test_operations_are_counted():
    tensors = inputs((7, 9), 3, 6)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        neighborhood_attention(*tensors[:3], 3, bias=tensors[3]).sum().backward()
    assert counter.get_total_flops() == 12 * 2 * 2 * 7 * 9 * 9 * 6
