"""Conformance of every backend of cross scan and cross merge."""

import itertools
import json

import hypothesis
import pytest
import torch
from hypothesis import strategies

from conformance import backends, force, poison_unwritten_memory
from parity import DATA
from vision_kernels import cross_merge, cross_scan
from vision_kernels.backends import BACKEND_VARIABLE, OPERATORS
from vision_kernels.native import INSTRUCTION_SETS

SCAN, MERGE = OPERATORS["cross_scan"], OPERATORS["cross_merge"]

ROUTES = ("cross", "unidirectional", "bidirectional")
RECORDED = json.loads((DATA / "kernels" / "cross_scan.json").read_text())

sizes = strategies.integers(1, 6)
images = {"batch": strategies.integers(0, 2), "dim": sizes, "height": sizes, "width": sizes}
given_images = hypothesis.given(**images, routes=strategies.sampled_from(ROUTES))
without_deadline = hypothesis.settings(max_examples=25, deadline=None)
# Smaller and larger than the vectors of any processor, and multiples of them or not.
IMAGES = [(1, 1), (1, 13), (13, 1), (2, 3), (4, 4), (7, 7), (5, 18), (8, 8), (14, 9), (16, 32), (17, 35), (28, 28)]


@pytest.fixture(params=backends(SCAN))
def backend(request, monkeypatch):
    return force(request.param, monkeypatch, SCAN, MERGE)


def orders(routes, height, width):
    """Return an explicit list of the positions of each route, in row-major order."""
    rows = [h * width + w for h in range(height) for w in range(width)]
    columns = [h * width + w for w in range(width) for h in range(height)]
    table = {
        "cross": (rows, columns, rows[::-1], columns[::-1]),
        "unidirectional": (rows,) * 4,
        "bidirectional": (rows, rows, rows[::-1], rows[::-1]),
    }
    return torch.tensor(table[routes])


def merge_oracle(y, height, width, routes):
    """Sum in float64, rounded once."""
    sequences = zip(orders(routes, height, width), y.double().unbind(1), strict=True)
    return sum(sequence[..., order.argsort()] for order, sequence in sequences).to(y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize(("height", "width"), IMAGES)
def test_agrees_with_explicit_tables(backend, height, width, routes, dtype):
    x, y = torch.randn(2, 3, height, width).to(dtype), torch.randn(2, 4, 3, height * width).to(dtype)
    expected = x.flatten(2)[:, :, orders(routes, height, width)].transpose(1, 2)
    assert torch.equal(cross_scan(x, routes), expected)
    merged = cross_merge(y, height, width, routes)
    torch.testing.assert_close(merged, merge_oracle(y, height, width, routes))
    assert cross_scan(x, routes).is_contiguous()
    assert merged.is_contiguous()


def test_any_strides_no_leaks_and_empty_batches(backend, monkeypatch):
    x = torch.randn(2, 6, 11, 17)
    scanned, merged = cross_scan(x), cross_merge(cross_scan(x), 11, 17)
    poison_unwritten_memory(monkeypatch)
    wide = torch.cat([x, x], dim=3)
    permuted = [
        x.permute(order).contiguous().permute(*map(order.index, range(4))) for order in itertools.permutations(range(4))
    ]
    for same in (*permuted, wide[..., :17], wide[..., 17:]):
        assert torch.equal(cross_scan(same), scanned)
    for dim in range(4):
        expanded = x.narrow(dim, 0, 1).expand_as(x)
        assert torch.equal(cross_scan(expanded), cross_scan(expanded.contiguous()))
        sequences = scanned.transpose(dim, 3).contiguous().transpose(dim, 3)
        assert torch.equal(cross_merge(sequences, 11, 17), merged)
        sequences = scanned.narrow(dim, 0, 1).expand_as(scanned)
        assert torch.equal(cross_merge(sequences, 11, 17), cross_merge(sequences.contiguous(), 11, 17))
    for empty in (x[:0], x[:, :0], x[:, :, :0], x[..., :0]):
        sequences = cross_scan(empty)
        assert sequences.shape == (empty.shape[0], 4, empty.shape[1], empty.shape[2] * empty.shape[3])
        assert cross_merge(sequences, *empty.shape[2:]).shape == empty.flatten(2).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_registered_properly(backend, dtype):
    x = torch.randn(2, 3, 9, 10).to(dtype).requires_grad_()
    y = torch.randn(2, 4, 3, 90).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.vision_kernels.cross_scan, (x, "cross"))
    torch.library.opcheck(torch.ops.vision_kernels.cross_merge, (y, 9, 10, "cross"))


def test_autocast_does_not_change_dtypes(backend):
    x = torch.randn(1, 2, 9, 10, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        merged = cross_merge(cross_scan(x), 9, 10)
    merged.sum().backward()
    assert merged.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, torch.full_like(x, 4))


@pytest.mark.parametrize("operator", [SCAN, MERGE], ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
def test_other_dtypes_fall_back_to_pytorch(operator, dtype, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    tensor = torch.zeros(1, 4, 1, 1, dtype=dtype)
    assert operator.select("cpu", tensor).backend == "torch"
    for name in set(backends(operator)) & set(INSTRUCTION_SETS):
        monkeypatch.setenv(BACKEND_VARIABLE, name)
        with pytest.raises(ValueError, match=f"{operator.name}={name}: moves float32 and bfloat16, not {dtype}"):
            operator.select("cpu", tensor)


@pytest.mark.parametrize("case", RECORDED["scan"])
def test_orders_agree_with_recorded_tables(case):
    shape, _, number = case.partition("/scans")
    batch, dim, height, width = map(int, shape.split("x"))
    routes, length = ROUTES[int(number)], height * width
    x = torch.arange(batch * dim * length).view(batch, dim, height, width)
    assert cross_scan(x, routes)[0].tolist() == RECORDED["scan"][case]
    y = torch.arange(batch * 4 * dim * length).view(batch, 4, dim, length)
    assert cross_merge(y, height, width, routes)[0].tolist() == RECORDED["merge"][case]


@without_deadline
@given_images
def test_merge_of_a_scan_is_four_times_the_image(batch, dim, height, width, routes):
    x = torch.randn(batch, dim, height, width)
    y = cross_scan(x, routes)
    assert y.shape == (batch, 4, dim, height * width)
    assert y.is_contiguous()
    torch.testing.assert_close(cross_merge(y, height, width, routes).view(x.shape), 4 * x)


@without_deadline
@given_images
def test_merge_is_the_transpose_of_scan(batch, dim, height, width, routes):
    x = torch.randn(batch, dim, height, width, dtype=torch.float64, requires_grad=True)
    y = torch.randn(batch, 4, dim, height * width, dtype=torch.float64, requires_grad=True)
    scanned, merged = cross_scan(x, routes), cross_merge(y, height, width, routes)
    torch.testing.assert_close((scanned * y).sum(), (x.flatten(2) * merged).sum())
    torch.testing.assert_close(torch.autograd.grad(scanned, x, y)[0].flatten(2), merged)
    torch.testing.assert_close(torch.autograd.grad(merged, y, x.flatten(2))[0], scanned)


def test_each_is_the_gradient_of_the_other(backend):
    x = torch.randn(2, 3, 14, 19, requires_grad=True)
    y = torch.randn(2, 4, 3, 14 * 19, requires_grad=True)
    scanned, merged = cross_scan(x), cross_merge(y, 14, 19)
    torch.testing.assert_close((scanned * y).sum(), (x.flatten(2) * merged).sum())
    assert torch.equal(torch.autograd.grad(scanned, x, y)[0].flatten(2), merged)
    assert torch.equal(torch.autograd.grad(merged, y, x.flatten(2))[0], scanned)


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("float64_backend", backends(SCAN, float64=True))
def test_gradients_are_right(float64_backend, routes, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, float64_backend)
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: cross_scan(x, routes), x)
        assert check(lambda y: cross_merge(y, 2, 3, routes), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_any_strides_and_dtypes(dtype):
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(dtype)
    expected = cross_scan(x)
    strided = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    for same in (x.contiguous(memory_format=torch.channels_last), strided):
        assert torch.equal(cross_scan(same), expected)
    expanded = x[:1].expand(2, -1, -1, -1)
    assert torch.equal(cross_scan(expanded), cross_scan(expanded.contiguous()))
    y = expected.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(cross_merge(y, 4, 5), cross_merge(expected, 4, 5))
    assert cross_merge(y, 4, 5).dtype == dtype


@pytest.mark.parametrize("routes", ROUTES)
def test_compiles_into_one_graph_and_exports(backend, routes):
    def there_and_back(x):
        return cross_merge(cross_scan(x, routes).sin(), *x.shape[2:], routes)

    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), there_and_back(x))
    compiled(x).sum().backward()

    class Module(torch.nn.Module):
        def forward(self, x):
            return there_and_back(x)

    batch = torch.export.Dim("batch")
    exported = torch.export.export(Module(), (x.detach(),), dynamic_shapes={"x": {0: batch}}).module()
    another = torch.randn(3, 3, 4, 5)
    torch.testing.assert_close(exported(another), there_and_back(another))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"cross_scan: x must be \(batch, dim, height, width\), got shape \(2, 3, 4\)"):
        cross_scan(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"cross_merge: y must be \(batch, 4, dim, length\), got shape \(2, 3, 4\)"):
        cross_merge(torch.zeros(2, 3, 4), 2, 2)
    with pytest.raises(ValueError, match=r"y has shape \(1, 3, 2, 4\), expected \(1, 4, 2, 4\) .* width 2"):
        cross_merge(torch.zeros(1, 3, 2, 4), 2, 2)
    with pytest.raises(ValueError, match=r"y has shape \(1, 4, 2, 4\), expected \(1, 4, 2, 6\) .* width 3"):
        cross_merge(torch.zeros(1, 4, 2, 4), 2, 3)
    with pytest.raises(ValueError, match=r"y has shape \(1, 4, 2, 4\), expected .* height -2 and width -2"):
        cross_merge(torch.zeros(1, 4, 2, 4), -2, -2)
    with pytest.raises(ValueError, match="cross_scan: routes must be one of cross, unidirectional, bidirectional, got"):
        cross_scan(torch.zeros(1, 1, 1, 1), "diagonal")
    with pytest.raises(ValueError, match="cross_merge: routes must be one of"):
        cross_merge(torch.zeros(1, 4, 1, 1), 1, 1, "diagonal")
