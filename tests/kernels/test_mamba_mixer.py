"""The fused mixer against its composition, and the choice between them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import emulation
import mambavision
from conformance import backends, force, poison_unwritten_memory, relative_rms
from mambavision.analysis import record_blocks
from mambavision.models.mambavision import MambaVisionMixer
from vision_kernels import mamba_mixer
from vision_kernels.backends import BACKEND_VARIABLE
from vision_kernels.mamba_mixer.cuda import why_unable
from vision_kernels.mamba_mixer.op import OPERATOR

FUSED = [name for name in backends(OPERATOR) if name != OPERATOR.composition]
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(params=FUSED)
def fused(request, monkeypatch):
    return force(request.param, monkeypatch, OPERATOR)


@pytest.fixture
def seen(monkeypatch):
    """Yield a list of the names of the package's operators as they are called."""
    names = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if isinstance(function, torch._ops.OpOverloadPacket):
                names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Watch():
        yield names


def inputs(batch=2, length=7, inner=20, rank=3, state=8, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    A = -4 * torch.rand(inner, state, generator=generator) - 0.2
    weights = normal(rank + 2 * state, inner) * inner**-0.5, normal(inner, rank) * rank**-0.5
    biases = normal(inner) - 1, normal(inner)
    tensors = normal(batch, length, 2 * inner), normal(2 * inner, 3), *weights, biases[0], A, normal(inner), biases[1]
    xz, *parameters = (each.to(device) for each in tensors)
    return [xz.to(dtype), *parameters]


def composed(arguments, monkeypatch):
    """Return the result of the composition in float64."""
    with monkeypatch.context() as patch:
        patch.setenv(BACKEND_VARIABLE, f"mamba_mixer={OPERATOR.composition}")
        return mamba_mixer(*(each.double() for each in arguments))


def oracle(xz, conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D, delta_bias):
    """Return the result for a batch of one, step by step in float64."""
    (xz,), inner = xz.double(), A.shape[0]
    padded = torch.nn.functional.pad(xz, (0, 0, 1, 1))
    silu = torch.nn.functional.silu(sum(padded[k : k + len(xz)] * conv_weight.double()[:, k] for k in range(3)))
    x, z = silu[:, :inner], silu[:, inner:]
    state, rows = torch.zeros_like(A).double(), []
    for step in x:
        low, B, C = (x_proj_weight.double() @ step).split([dt_proj_weight.shape[1], A.shape[1], A.shape[1]])
        delta = (1 + (dt_proj_weight.double() @ low + dt_bias + delta_bias).exp()).log()[:, None]
        state = (delta * A).exp() * state + delta * B * step[:, None]
        rows.append(state @ C + D * step)
    return torch.cat([torch.stack(rows), z], dim=1)[None]


def test_composition_is_the_definition(monkeypatch):
    arguments = inputs(batch=1, length=9)
    assert relative_rms(composed(arguments, monkeypatch), oracle(*arguments)) < 1e-12


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "inner", "rank", "state"),
    [
        (2, 1, 20, 3, 8),
        (2, 49, 40, 5, 8),
        (1, 33, 12, 17, 3),  # an odd rank beyond one product
        (2, 16, 24, 16, 16),
        (1, 65, 4, 1, 1),
        (1, 20, 264, 33, 8),  # more channels than warps process at once
    ],
)
def test_agrees_with_the_composition(fused, batch, length, inner, rank, state, dtype, monkeypatch):
    arguments = inputs(batch, length, inner, rank, state, dtype)
    expected = composed(arguments, monkeypatch)
    poison_unwritten_memory(monkeypatch)
    found = mamba_mixer(*arguments)
    assert found.dtype == dtype
    for ours, truth in zip(found.chunk(2, dim=-1), expected.chunk(2, dim=-1), strict=True):
        assert relative_rms(ours, truth) < LIMITS[dtype]


def test_any_strides_weight_dtypes_and_empty_batches(fused, monkeypatch):
    arguments = inputs(length=17)
    expected = mamba_mixer(*arguments)
    strided = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in arguments]
    assert torch.equal(mamba_mixer(*strided), expected)
    unaligned = [torch.cat([each.new_zeros(1), each.flatten()])[1:].view(each.shape) for each in arguments]
    assert torch.equal(mamba_mixer(*unaligned), expected)
    assert mamba_mixer(arguments[0][:0], *arguments[1:]).shape == (0, 17, 40)
    halves = [arguments[0], *(each.bfloat16() for each in arguments[1:])]
    assert relative_rms(mamba_mixer(*halves), composed(halves, monkeypatch)) < 1e-5


def test_gradients_come_from_the_composition(fused, seen):
    arguments = inputs()
    mamba_mixer(*arguments)
    arguments[1].requires_grad_()
    mamba_mixer(*arguments).sum().backward()
    with torch.no_grad():
        mamba_mixer(*arguments)
    assert seen == ["mamba_mixer", "conv1d_silu", "selective_scan", "mamba_mixer"]
    assert arguments[1].grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="mamba_mixer has no gradient"):
        torch.ops.vision_kernels.mamba_mixer(*arguments).sum().backward()


@pytest.mark.parametrize("setting", ["", "torch", "reference", "mamba_mixer=composed", "conv1d_silu=torch"])
def test_cpu_uses_the_composition(setting, seen, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, setting)
    mamba_mixer(*inputs())
    assert seen == ["conv1d_silu", "selective_scan"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"length": 1024}, r"needs \d+ KiB of shared memory for 1024 steps of 160 channels, and has 227"),
        ({"dtype": torch.float64}, "computes float32, float16 and bfloat16, not torch.float64"),
        ({"inner": 18}, "takes 3 taps and multiples of 4 channels up to 3584, not 3 and 18"),
        ({"state": 17}, "has registers for 1 to 16 states, and A has 17"),
    ],
)
def test_unsupported_sizes_are_named_if_forced(change, reason, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, f"mamba_mixer={emulation.BACKEND}")
    with pytest.raises(ValueError, match=f"mamba_mixer={emulation.BACKEND}: {reason}"):
        mamba_mixer(*inputs(**{"batch": 1, "length": 1, "inner": 160, "rank": 20, **change}))


def test_unsupported_sizes_are_composed_otherwise(seen, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, emulation.BACKEND)
    mamba_mixer(*inputs(inner=18))
    mamba_mixer(*inputs(inner=20))
    assert seen == ["conv1d_silu", "selective_scan", "mamba_mixer"]


def test_windows_of_the_models_fit():
    for length, inner in ((196, 160), (196, 256), (196, 392), (49, 784), (256, 160), (64, 1024)):
        assert why_unable(torch.device("cpu"), torch.bfloat16, length, inner, -(-inner // 8), 8, 3) is None


def test_operator_is_registered_properly(fused):
    torch.library.opcheck(torch.ops.vision_kernels.mamba_mixer, inputs())
    torch.library.opcheck(torch.ops.vision_kernels.mamba_mixer, inputs(dtype=torch.bfloat16))


def test_compiles_and_exports_as_one_operator(fused):
    class Mixer(torch.nn.Module):
        def forward(self, *arguments):
            return mamba_mixer(*arguments).sin()

    arguments, wider = inputs(), inputs(batch=3)
    compiled = torch.compile(Mixer(), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*arguments), mamba_mixer(*arguments).sin())
    torch.testing.assert_close(compiled(*wider), mamba_mixer(*wider).sin())
    shapes = (({0: torch.export.Dim("batch")}, *(None,) * 7),)
    exported = torch.export.export(Mixer(), tuple(arguments), dynamic_shapes=shapes)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == ["vision_kernels.mamba_mixer.default", "aten.sin.default"]
    torch.testing.assert_close(exported.module()(*wider), mamba_mixer(*wider).sin())


def test_composition_compiles_with_any_length(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    compiled = torch.compile(mamba_mixer, backend="aot_eager", fullgraph=True, dynamic=True)
    for arguments in (inputs(), inputs(length=9)):
        torch.testing.assert_close(compiled(*arguments), mamba_mixer(*arguments))


def test_models_operation_counts_and_recordings_match_the_composition(fused, monkeypatch):
    def counted():
        with FlopCounterMode(display=False) as counter:
            mamba_mixer(*inputs())
        return counter.get_total_flops()

    sizes = {"depths": (1, 1, 1, 1), "dim": 8, "in_dim": 8, "num_heads": (1, 1, 2, 2), "num_classes": 3}
    model = mambavision.create_model("mamba_vision_T", **sizes).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = model(images)
    operations, (record,) = counted(), record_blocks(model, images, ["levels.2.blocks.0"])
    monkeypatch.setenv(BACKEND_VARIABLE, "")
    assert counted() == operations
    (expected,) = record_blocks(model, images, ["levels.2.blocks.0"])
    torch.testing.assert_close((record.delta, record.B), (expected.delta, expected.B))
    torch.testing.assert_close(model(images), logits)


def test_wrong_arguments_are_named():
    arguments = inputs()
    with pytest.raises(ValueError, match=r"xz has shape \(2, 7, 39\), expected \(2, 7, 40\) to go with dt_proj_weight"):
        mamba_mixer(arguments[0][..., 1:], *arguments[1:])
    with pytest.raises(ValueError, match=r"x_proj_weight has shape \(18, 20\), expected \(19, 20\)"):
        mamba_mixer(*arguments[:2], arguments[2][1:], *arguments[3:])
    with pytest.raises(ValueError, match=r"xz must be \(batch, length, 2 inner\), got shape \(7, 40\)"):
        mamba_mixer(arguments[0][0], *arguments[1:])


def test_layers_with_hooks_and_adapters_are_called():
    mixer = MambaVisionMixer(16).eval()
    x = torch.randn(2, 5, 16)
    expected, calls = mixer(x), []
    handle = mixer.x_proj.register_forward_hook(lambda *each: calls.append(each))
    torch.testing.assert_close(mixer(x), expected)
    assert len(calls) == 1
    handle.remove()
    mixer.x_proj = torch.nn.Sequential(mixer.x_proj, torch.nn.Hardtanh(-0.01, 0.01))  # an adapter
    assert (mixer(x) - expected).abs().max() > 1e-3
