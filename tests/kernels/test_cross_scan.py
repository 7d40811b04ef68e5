"""Cross scan and cross merge."""

import json

import hypothesis
import pytest
import torch
from hypothesis import strategies

from parity import DATA
from vision_kernels import cross_merge, cross_scan

ROUTES = ("cross", "unidirectional", "bidirectional")
RECORDED = json.loads((DATA / "kernels" / "cross_scan.json").read_text())

sizes = strategies.integers(1, 6)
images = {"batch": strategies.integers(0, 2), "dim": sizes, "height": sizes, "width": sizes}
given_images = hypothesis.given(**images, routes=strategies.sampled_from(ROUTES))
without_deadline = hypothesis.settings(max_examples=25, deadline=None)


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
def test_merge_undoes_scan_four_times(batch, dim, height, width, routes):
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


@pytest.mark.parametrize("routes", ROUTES)
def test_gradients_are_right(routes):
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cross_scan(x, routes), x)
    assert torch.autograd.gradcheck(lambda y: cross_merge(y, 2, 3, routes), y)


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
def test_compiles_into_one_graph_and_exports(routes):
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
    with pytest.raises(ValueError, match="cross_scan: routes must be one of cross, unidirectional, bidirectional, got"):
        cross_scan(torch.zeros(1, 1, 1, 1), "diagonal")
    with pytest.raises(ValueError, match="cross_merge: routes must be one of"):
        cross_merge(torch.zeros(1, 4, 1, 1), 1, 1, "diagonal")
