"""Conformance of every SS2D backend; new backends are tested automatically."""

import functools
import json

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies
from torch.utils.flop_counter import FlopCounterMode

import emulation
from conformance import COMPUTING_FLOAT64, backends, force, poison_unwritten_memory, relative_rms
from parity import DATA, values
from vision_kernels import cross_merge, cross_scan, selective_scan, ss2d
from vision_kernels.backends import BACKEND_VARIABLE
from vision_kernels.ss2d import cuda
from vision_kernels.ss2d.op import OPERATOR

ROUTES = ("cross", "unidirectional", "bidirectional")
TENSORS = ("x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A", "D")
# batch, dim, height, width, rank, state
SHAPES = [
    (2, 5, 1, 1, 1, 1),
    (1, 16, 1, 13, 2, 1),
    (1, 16, 13, 1, 3, 2),
    (2, 21, 2, 7, 6, 1),
    (1, 33, 7, 2, 5, 4),
    (1, 48, 7, 13, 12, 1),
    (2, 16, 14, 17, 6, 1),
    (1, 20, 17, 2, 13, 16),
    (2, 40, 7, 7, 8, 1),
    (1, 9, 14, 14, 7, 5),
    (1, 36, 9, 6, 4, 8),
]


@pytest.fixture(params=backends(OPERATOR))
def backend(request, monkeypatch):
    return force(request.param, monkeypatch, OPERATOR)


def inputs(batch=2, dim=6, height=3, width=4, rank=2, state=3, dtype=torch.float32, parameters=None, seed=0):
    """Return the tensors of the operator; `dtype` is that of x, and of the parameters unless they have another."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, of=parameters or dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(of).requires_grad_()

    A = -torch.rand(4 * dim, state, generator=generator, dtype=torch.float64) - 0.2
    return [
        normal(batch, dim, height, width, of=dtype),
        normal(4, rank + 2 * state, dim, scale=dim**-0.5),
        normal(4, dim, rank, scale=rank**-0.5),
        normal(4, dim),
        A.to(parameters or dtype).requires_grad_(),
        normal(4 * dim),
    ]


def projected(x, x_proj_weight, *others):
    """Return the arguments of the registered operator from those of the function."""
    projections = F.linear(x.flatten(2).transpose(1, 2), x_proj_weight.flatten(0, 1).to(x.dtype))
    tensors = (x, projections.unflatten(2, x_proj_weight.shape[:2]), *others)
    return [each.detach().requires_grad_() for each in tensors]


def with_gradients(arguments, weights, *options, function=ss2d):
    leaves = [each.detach().requires_grad_() for each in arguments]
    y = function(*leaves, *options)
    (y.double() * weights).sum().backward()
    return [y.detach()] + [leaf.grad for leaf in leaves]


def order(route, routes, height, width):
    """Return an explicit list of the positions of a route, in row-major order."""
    rows = [h * width + w for h in range(height) for w in range(width)]
    columns = [h * width + w for w in range(width) for h in range(height)]
    table = {
        "cross": (rows, columns, rows[::-1], columns[::-1]),
        "unidirectional": (rows,) * 4,
        "bidirectional": (rows, rows, rows[::-1], rows[::-1]),
    }
    return torch.tensor(table[routes][route])


def oracle(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, routes):
    """Compute the same position by position, in the precision of the arguments."""
    batch, dim, height, width = x.shape
    rank, state = dt_projs_weight.shape[2], A.shape[1]
    y = 0
    for j in range(4):
        here = slice(j * dim, (j + 1) * dim)
        forth = order(j, routes, height, width)
        u = x.flatten(2)[:, :, forth]
        low, B, C = (x_proj_weight[j] @ u).split([rank, state, state], dim=1)
        step = F.softplus(dt_projs_weight[j] @ low + dt_projs_bias[j].view(-1, 1))
        h, outputs = torch.zeros(batch, dim, state, dtype=x.dtype), []
        columns = zip(*(each.unbind(-1) for each in (u, step, B, C)), strict=True)
        for u_t, step_t, B_t, C_t in columns:
            h = (step_t.unsqueeze(2) * A[here]).exp() * h + (step_t * u_t).unsqueeze(2) * B_t.unsqueeze(1)
            outputs.append((h * C_t.unsqueeze(1)).sum(2) + D[here] * u_t)
        y = y + torch.stack(outputs, dim=2)[:, :, forth.argsort()]
    return y.view(x.shape)


@functools.cache
def oracle_case(shape, dtype):
    """Return arguments, routes, the gradient of y, and the oracle's results; the same for every backend."""
    case = SHAPES.index(shape)
    arguments, routes = inputs(*shape, dtype=dtype, seed=case), ROUTES[case % 3 if case < 6 else 0]
    if case % 2:
        arguments[0] = arguments[0].detach().contiguous(memory_format=torch.channels_last)
    weights = torch.randn(shape[:4], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = [each.double() for each in arguments]
    return arguments, routes, weights, with_gradients(exact, weights, routes, function=oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_a_float64_oracle(backend, shape, dtype):
    arguments, routes, weights, expected = oracle_case(shape, dtype)
    found = with_gradients(arguments, weights, routes)
    forward, gradient = (1e-5, 1e-4) if dtype == torch.float32 else (5e-3, 1e-2)
    for name, ours, truth in zip(("y", *TENSORS), found, expected, strict=True):
        if truth.any():  # A has no effect on an image of one position
            assert relative_rms(ours, truth) <= (forward if name == "y" else gradient), name
        else:
            assert ours.abs().max() < 1e-6, name
    assert [each.dtype for each in found] == [dtype] * len(found)


def test_agrees_with_its_parts(backend):
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D = arguments = inputs(2, 20, 7, 9, 3, 2)
    sequences = cross_scan(x)
    low, B, C = torch.einsum("bkdl,kcd->bkcl", sequences, x_proj_weight).split([3, 2, 2], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", low, dt_projs_weight).flatten(1, 2)
    y = selective_scan(sequences.flatten(1, 2), delta, A, B, C, D, dt_projs_bias.flatten(), True)
    torch.testing.assert_close(ss2d(*arguments), cross_merge(y.unflatten(1, (4, -1)), 7, 9).view(x.shape))


def vmamba_module(item, x):
    """Compute VMamba's SS2D around the operator, with the parameters of a recorded module."""
    parameters = {key: torch.from_numpy(values(key, tuple(shape))) for key, shape in item["entries"]}
    dim = parameters["out_norm.weight"].shape[0]
    x, *gate = F.conv2d(x, parameters["in_proj.weight"][:, :, None, None]).split(dim, dim=1)
    x = F.silu(F.conv2d(x, parameters["conv2d.weight"], padding=1, groups=dim))
    names = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
    arguments = [-parameters[name].exp() if name == "A_logs" else parameters[name] for name in names]
    if not item["channel_first"]:
        x = x.contiguous(memory_format=torch.channels_last)
    y = ss2d(x, *arguments).permute(0, 2, 3, 1)
    y = F.layer_norm(y, (dim,), parameters["out_norm.weight"], parameters["out_norm.bias"]).permute(0, 3, 1, 2)
    y = y * F.silu(gate[0]) if gate else y
    return F.conv2d(y, parameters["out_proj.weight"][:, :, None, None])


def test_agrees_with_recorded_vmamba_modules(backend):
    recorded = np.load(DATA / "kernels" / "ss2d.npz")
    x = np.random.Generator(np.random.PCG64(11)).standard_normal((2, 16, 5, 7), dtype=np.float32)
    items = json.loads((DATA / "kernels" / "ss2d.json").read_text())["items"]
    assert len(items) == 5
    for item in items:
        y = vmamba_module(item, torch.from_numpy(x))
        np.testing.assert_allclose(y, recorded[item["name"]], rtol=0, atol=3e-6, err_msg=item["name"])


def test_agrees_with_recorded_segman_numbers(backend):
    dtype = torch.float32 if backend not in COMPUTING_FLOAT64 else torch.float64
    tolerance = 1e-10 if dtype == torch.float64 else 5e-6  # torch's softplus is linear above 20, to 2e-9
    recorded = np.load(DATA / "kernels" / "vssm.npz")
    names = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
    tensors = [torch.from_numpy(recorded[f"param/{name}"]).to(dtype).requires_grad_() for name in names]
    x = torch.from_numpy(recorded["x"]).to(dtype).requires_grad_()
    x_proj, dt_weight, dt_bias, A_logs, D = tensors
    y = ss2d(x, x_proj.view(4, -1, x.shape[1]), dt_weight, dt_bias, -A_logs.exp(), D).flatten(2)
    y.backward(torch.from_numpy(recorded["grad_out"]).to(dtype))
    found = {"y": y.detach(), "grad_x": x.grad} | {f"grad/{n}": t.grad for n, t in zip(names, tensors, strict=True)}
    for name, ours in found.items():
        assert relative_rms(ours, torch.from_numpy(recorded[name])) < tolerance, name


@pytest.mark.parametrize("precise_backend", backends(OPERATOR, float64=True))
@pytest.mark.parametrize("routes", ROUTES)
def test_gradients_are_right(routes, precise_backend, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, precise_backend)
    arguments = inputs(1, 2, 2, 3, 1, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *each: ss2d(*each, routes), arguments)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_is_registered_properly(backend, dtype, channels_last):
    arguments = projected(*inputs(dtype=dtype, parameters=torch.float32))
    if channels_last:
        arguments[0] = arguments[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    operators = torch.ops.vision_kernels
    torch.library.opcheck(operators.ss2d, [*arguments, "cross", torch.float32])
    plain = [each.detach() for each in arguments]
    grad_y = torch.randn_like(plain[0], dtype=torch.float32)
    torch.library.opcheck(operators.ss2d_backward, [grad_y, *plain, "cross"])


def strided_copies(image):
    """Yield the image with other strides, and whether its channels are adjacent."""
    yield image.contiguous(memory_format=torch.channels_last), True
    yield torch.cat([image, image], dim=1).contiguous(memory_format=torch.channels_last)[:, : image.shape[1]], True
    yield image.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0), True
    yield image.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), False
    yield F.pad(image, (1, 2, 3, 1))[..., 3:-1, 1:-2], False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_input_may_have_any_strides(backend, dtype):
    arguments = [each.detach() for each in inputs(2, 18, 3, 5, dtype=dtype)]
    weights = torch.randn(2, 18, 3, 5)
    expected = with_gradients(arguments, weights)
    others = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in arguments[1:]]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-2}
    for x, adjacent in strided_copies(arguments[0]):
        found = with_gradients([x, *others], weights)
        for name, ours, theirs in zip(("y", *TENSORS), found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        layout = torch.channels_last if adjacent else torch.contiguous_format
        assert found[0].is_contiguous(memory_format=layout)
        tensors = projected(x, *others)
        tensors[1] = tensors[1].detach().transpose(1, 3).contiguous().transpose(1, 3)
        y = torch.ops.vision_kernels.ss2d(*tensors, "cross", dtype)
        grad_y = torch.randn_like(y).transpose(2, 3).contiguous().transpose(2, 3)
        grads = torch.ops.vision_kernels.ss2d_backward(grad_y, *tensors, "cross")
        assert grads[0].is_contiguous(memory_format=layout)
        assert all(each.is_contiguous() for each in grads[1:])
    expanded = arguments[0][:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(ss2d(expanded, *arguments[1:]), ss2d(expanded.contiguous(), *arguments[1:]), **tolerance)


def test_output_may_be_more_precise_than_the_input(backend):
    """As in SegMAN, which normalizes the output in float32."""
    arguments = inputs(2, 17, 7, 5, dtype=torch.bfloat16, parameters=torch.float32)
    y, grad_x, *others = with_gradients(arguments, 1.0, "cross", torch.float32)
    assert y.dtype == torch.float32
    assert grad_x.dtype == torch.bfloat16
    assert {each.dtype for each in others} == {torch.float32}
    torch.testing.assert_close(y.bfloat16(), ss2d(*arguments))
    projections = projected(*arguments)
    exact = torch.ops.vision_kernels.ss2d(*(each.float() for each in projections), "cross", torch.float32)
    torch.testing.assert_close(y, exact)


def test_autocast_leaves_the_scan_precise(backend):
    arguments = inputs(1, 16, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = ss2d(*arguments)
    assert y.dtype == torch.float32
    assert 0 < relative_rms(y, ss2d(*arguments)) < 1e-2
    y.sum().backward()


def test_compiles_into_one_graph(backend):
    arguments = inputs()
    compiled = torch.compile(lambda *each: ss2d(*each).sin(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), ss2d(*arguments).sin())
    compiled(*arguments).sum().backward()


def test_exports_with_any_batch_size(backend):
    class Module(torch.nn.Module):
        def forward(self, x, *others):
            return ss2d(x, *others)

    x, *others = (each.detach() for each in inputs())
    shapes = {"x": {0: torch.export.Dim("batch")}, "others": tuple({} for _ in others)}
    exported = torch.export.export(Module(), (x, *others), dynamic_shapes=shapes).module()
    x = torch.randn(5, *x.shape[1:])
    torch.testing.assert_close(exported(x, *others), ss2d(x, *others))


def test_unwritten_memory_does_not_leak(backend, monkeypatch):
    arguments = inputs(2, 37, 5, 7)
    expected = with_gradients(arguments, 1.0)
    poison_unwritten_memory(monkeypatch)
    for ours, theirs in zip(with_gradients(arguments, 1.0), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 40, 7, 9, 3, 1), (1, 70, 7, 9, 3, 2)], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(backend, shape):
    arguments, threads = projected(*inputs(*shape)), torch.get_num_threads()

    def scanned(*each):
        return torch.ops.vision_kernels.ss2d(*each, "cross", torch.float32)

    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(with_gradients(arguments, 1.0, function=scanned))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        if backend not in COMPUTING_FLOAT64:  # torch's matrix products do not guarantee it
            assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_steps_give_finite_results(backend, extreme):
    arguments = inputs(1, 16, 7, 7)
    arguments[3] = torch.full_like(arguments[3], extreme, requires_grad=True)
    assert all(each.isfinite().all() for each in with_gradients(arguments, 1e-3))


def test_small_steps_have_accurate_gradients(backend):
    arguments = inputs(1, 16, 5, 5)
    arguments[3] = torch.full_like(arguments[3], -12.0, requires_grad=True)
    found = with_gradients(arguments, 1.0)
    expected = with_gradients([each.double() for each in arguments], 1.0, "cross", function=oracle)
    assert relative_rms(found[4], expected[4]) < 1e-5


def test_nan_stays_in_its_channel(backend):
    arguments = projected(*inputs(1, 18, 3, 3))
    arguments[0] = arguments[0].detach().clone()
    arguments[0][:, 5] = float("nan")
    y = torch.ops.vision_kernels.ss2d(*arguments, "cross", torch.float32)
    assert y[:, 5].isnan().all()
    assert y[:, :5].isfinite().all()
    assert y[:, 6:].isfinite().all()


@hypothesis.settings(
    max_examples=8, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    seed=strategies.integers(0, 2**16),
    order_of_images=strategies.permutations(range(3)),
    size=strategies.tuples(strategies.integers(1, 5), strategies.integers(1, 5)),
)
def test_images_do_not_mix_and_may_be_transposed(backend, seed, order_of_images, size):
    x, *parameters = inputs(3, 18, *size, seed=seed)
    y = ss2d(x, *parameters)
    torch.testing.assert_close(ss2d(x[order_of_images], *parameters), y[order_of_images], rtol=1e-4, atol=1e-5)
    # The rows of an image are the columns of its transpose: routes 0 and 2 swap with 1 and 3.
    swapped = [each.unflatten(0, (4, -1))[[1, 0, 3, 2]].reshape(each.shape) for each in parameters]
    torch.testing.assert_close(ss2d(x.transpose(2, 3), *swapped), y.transpose(2, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [False, True], ids=["a block for a route", "a block for a round"])
@pytest.mark.parametrize("shared_sums", [True, False], ids=["sums in shared memory", "sums elsewhere"])
@pytest.mark.parametrize(
    ("state", "steps", "width"), [(1, 2, 9), (1, 7, 29), (1, 8, 29), (3, 2, 9), (8, 2, 9), (16, 2, 9)]
)
def test_cuda_kernels_agree_if_routes_are_divided(monkeypatch, state, steps, width, shared_sums, split):
    """Small images take one round; here they are divided like large ones."""
    if emulation.BACKEND not in backends(OPERATOR):
        pytest.skip("no compiler for the emulator")

    def plan_of(gpu, blocks, length, max_steps, *others):
        cut = min(steps, max_steps)
        return cuda.Plan(2, cut, -(-length // (2 * 8 * cut)), shared_sums)

    arguments = inputs(2, 21, 5, width, 3, state, dtype=torch.float16)
    expected = with_gradients([each.double() for each in arguments], 1.0, function=ss2d)
    monkeypatch.setattr(cuda, "plan_of", plan_of)
    monkeypatch.setattr(cuda, "gpu_of", lambda device: cuda.Gpu(132 if split else 1, 0))
    monkeypatch.setenv(BACKEND_VARIABLE, f"ss2d={emulation.BACKEND}")
    for name, ours, truth in zip(("y", *TENSORS), with_gradients(arguments, 1.0), expected, strict=True):
        assert relative_rms(ours, truth) < 2e-3, name


@pytest.mark.parametrize("gpu", [cuda.Gpu(132, 225 << 10), cuda.Gpu(40, 62 << 10)], ids=["large GPU", "small GPU"])
@pytest.mark.parametrize("length", [1, 49, 3136, 2**20])
@pytest.mark.parametrize("bytes_of_warp", [512, 5000])
def test_cuda_plans_cover_the_route_and_fit_the_gpu(gpu, length, bytes_of_warp):
    plan = cuda.plan_of(gpu, 64, length, 4, 12, bytes_of_warp, 0.8)
    assert plan.warps * plan.steps * plan.rounds * 8 >= length
    assert plan.warps * bytes_of_warp + plan.shared_sums * length * 64 <= gpu.shared_bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_precisions_fall_back(dtype, monkeypatch):
    arguments = inputs(dtype=dtype)
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    y = ss2d(*arguments)
    assert y.dtype == dtype
    y.sum().backward()
    monkeypatch.setenv(BACKEND_VARIABLE, "ss2d=baseline")
    with pytest.raises(ValueError, match=r"baseline: (not built|computes float32 and bfloat16, not torch\.float)"):
        ss2d(*arguments)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 6, 12)),
        ("x_proj_weight", (4, 7, 6)),
        ("x_proj_weight", (32, 6, 1)),
        ("dt_projs_weight", (4, 5, 2)),
        ("dt_projs_weight", (24, 2)),
        ("dt_projs_bias", (24,)),
        ("A", (6, 3)),
        ("A", (24,)),
        ("D", (6,)),
    ],
)
def test_wrong_shapes_are_named(name, shape):
    arguments = dict(zip(TENSORS, inputs(), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"ss2d: .*") as error:
        ss2d(**arguments)
    assert str(tuple(shape)) in str(error.value)


def test_wrong_routes_types_and_devices_are_named():
    x, x_proj_weight, *others = inputs()
    with pytest.raises(ValueError, match=r"ss2d: routes must be one of cross, unidirectional, .*, got 'zigzag'"):
        ss2d(x, x_proj_weight, *others, routes="zigzag")
    with pytest.raises(ValueError, match=r"x_proj_weight must be a real floating-point tensor, got torch\.int64"):
        ss2d(x, x_proj_weight.long(), *others)
    with pytest.raises(ValueError, match="ss2d: x_proj_weight is on meta, x is on cpu"):
        ss2d(x, x_proj_weight.to("meta"), *others)
    with pytest.raises(ValueError, match=r"out_dtype must be a real floating-point type, got torch\.int32"):
        ss2d(x, x_proj_weight, *others, out_dtype=torch.int32)


def test_operations_are_counted():
    batch, dim, height, width, rank, state = 2, 6, 3, 4, 5, 7
    arguments = inputs(batch, dim, height, width, rank, state)
    routes_and_positions = batch * 4 * height * width
    projection = 2 * routes_and_positions * (rank + 2 * state) * dim
    scan = routes_and_positions * dim * (9 * state + 2 + 2 * rank)
    with FlopCounterMode(display=False) as counter:
        y = ss2d(*arguments)
    assert counter.get_total_flops() == projection + scan
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (projection + scan)
