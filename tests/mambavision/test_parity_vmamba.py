"""VMamba's recorded modules and gradients, and what its variants are made of."""

import numpy as np
import pytest
import torch

import mambavision
from mambavision.models.ss2d import SS2D
from parity import fill_, image, loss_and_gradient_norms, recorded


def test_gradients():
    manifest, _ = recorded("vmamba/tiny_s1l8_grad")
    model = fill_(mambavision.create_model("vmamba_tiny_s1l8", drop_path_rate=0.0)).train()
    loss, norms = loss_and_gradient_norms(model, image(2, 224, 224, seed=4))
    assert loss == pytest.approx(manifest["loss"], rel=1e-6)
    assert norms.keys() == manifest["grad_l2"].keys()
    for name, norm in manifest["grad_l2"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-5), name


SS2D_ITEMS = recorded("kernels/ss2d")[0]["items"]


@pytest.mark.parametrize("item", SS2D_ITEMS, ids=lambda item: item["name"])
def test_modules(item):
    """Both layouts and both ways to write the projections are one here."""
    shapes = dict(item["entries"])
    gate = "noz" not in item["forward_type"]
    op = SS2D(16, d_state=shapes["A_logs"][1], conv_bias=False, gate=gate).eval()
    assert [[key, list(value.shape)] for key, value in op.state_dict().items()] == item["entries"]
    noise = np.random.Generator(np.random.PCG64(11)).standard_normal((2, 16, 5, 7), dtype=np.float32)
    y = fill_(op)(torch.from_numpy(noise).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    expected = recorded("kernels/ss2d")[1][item["name"]]
    np.testing.assert_allclose(y.detach(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("gate", [False, True])
@torch.inference_mode()
def test_cascade_scans_lines_of_the_normalised_map(gate):
    """Against the definition, line by line."""
    op = fill_(SS2D(8, d_state=2, ratio=1.0, routes="cascade", gate=gate)).eval()
    x = torch.randn(1, 3, 4, 8)
    projected = op.in_proj(x)
    entering, z = projected.chunk(2, -1) if gate else (projected, None)
    entering = torch.nn.functional.silu(op.conv2d(entering.permute(0, 3, 1, 2)))[0]  # (channels, rows, columns)

    def scanned(line, route):
        """A sequential scan of (channels, length)."""
        low, B, C = (op.x_proj_weight[route] @ line).split([op.dt_rank, 2, 2])
        delta = torch.nn.functional.softplus(op.dt_projs_weight[route] @ low + op.dt_projs_bias[route][:, None])
        A, D = -op.A_logs.view(4, 8, 2)[route].exp(), op.Ds.view(4, 8)[route]
        state, out = torch.zeros(8, 2), []
        for t in range(line.shape[1]):
            state = (delta[:, t, None] * A).exp() * state + delta[:, t, None] * B[:, t] * line[:, t, None]
            out.append(state @ C[:, t] + D * line[:, t])
        return torch.stack(out, dim=1)

    def normalised(image):
        return (image - image.mean(0)) / (image.var(0, unbiased=False) + 1e-5).sqrt()

    # The backward scan is added as it comes out, in the order in which it has read.
    def by_lines(image, forward, backward):
        lines = [scanned(line, forward) + scanned(line.flip(1), backward) for line in normalised(image).unbind(1)]
        return torch.stack(lines, dim=1)

    rows = by_lines(entering, 0, 1)
    columns = by_lines(rows.transpose(1, 2), 2, 3).transpose(1, 2)
    y = torch.nn.functional.layer_norm(columns.permute(1, 2, 0), (8,), op.out_norm.weight, op.out_norm.bias)
    expected = op.out_proj(y * torch.nn.functional.silu(z[0]) if gate else y)
    torch.testing.assert_close(op(x)[0], expected, rtol=1e-4, atol=1e-5)


OPTIONS = [
    {"routes": "cascade", "d_state": 2},
    {"routes": "unidirectional"},
    {"routes": "bidirectional"},
    {"out_norm": "none"},
    {"out_norm": "depthwise"},
    {"out_norm": "layer_depthwise"},
    {"out_norm": "softmax"},
    {"out_norm": "sigmoid"},
    {"gate": True, "gate_act": False, "out_act": True},
    {"conv_size": -1, "act_layer": "relu"},
    {"init": "normal", "dt_rank": 3, "drop": 0.5},
    {"init": "uniform", "conv_size": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_the_mixer(options):
    op = SS2D(12, **options)
    x = torch.randn(2, 5, 7, 12)
    y = op(x)
    assert y.shape == x.shape
    y.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in op.parameters())
    op.eval()
    torch.testing.assert_close(op(x)[1:], op(x[1:]))  # images do not mix


@pytest.mark.parametrize("name", ["routes", "out_norm", "init", "act_layer"])
def test_unknown_options_are_named(name):
    with pytest.raises(ValueError, match=r"must be one of '.*', got 'diagonal'"):
        SS2D(8, **{name: "diagonal"})


def test_softmax_of_the_mixer_is_over_positions():
    op = SS2D(8, ratio=1.0, out_norm="softmax").eval()
    y = op.out_norm(torch.randn(2, 8, 3, 5))
    torch.testing.assert_close(y.sum((2, 3)), torch.ones(2, 8))


def test_initial_weights():
    """Of the scan as Mamba's, of linear layers as the general rule says."""
    model = mambavision.create_model("vanilla_vmamba_tiny", drop_path_rate=0.3)
    op = model.layers[1].blocks[1].op
    torch.testing.assert_close(op.A_logs, torch.arange(1.0, 17.0).log().expand_as(op.A_logs))
    assert op.Ds.eq(1).all()
    dt = torch.nn.functional.softplus(op.dt_projs_bias)
    assert 1e-3 * 0.99 <= dt.min() < dt.max() <= 0.1 * 1.01
    for weight, fan_in in ((op.dt_projs_weight, 12), (op.x_proj_weight, 384)):
        assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
        assert weight.abs().max() <= fan_in**-0.5
    assert op.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[0].downsample.reduction.weight.std().item() == pytest.approx(0.02, rel=0.05)
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 15), atol=1e-7)


@pytest.mark.parametrize(("init", "spread"), [("normal", 1.0), ("uniform", 0.0)])
def test_other_initial_weights(init, spread):
    op = SS2D(96, init=init)
    assert op.A_logs.std().item() == pytest.approx(spread, abs=0.1)
    assert op.dt_projs_weight.std().item() == pytest.approx(0.1 if init == "normal" else 0.1 / 12**0.5, rel=0.1)
    assert (op.dt_projs_bias.min() < 0) == (init == "normal")


@torch.inference_mode()
def test_merging_reads_the_corners_of_squares_by_columns():
    model = mambavision.create_model("vanilla_vmamba_tiny", dims=4, depths=(1, 1), num_classes=0)
    merge = model.layers[0].downsample
    merge.norm = torch.nn.Identity()
    merge.reduction = torch.nn.Identity()
    x = torch.arange(9.0).view(1, 1, 3, 3)  # an odd side is padded with zeros
    expected = [[[0, 2], [6, 8]], [[3, 5], [0, 0]], [[1, 0], [7, 0]], [[4, 0], [0, 0]]]
    assert merge(x)[0].tolist() == expected


def test_learned_positions_are_resized_for_other_images():
    model = mambavision.create_model(
        "vmamba_tiny_s1l8", dims=8, depths=(1, 1), pos_embed_size=(32, 32), num_classes=2
    ).eval()
    assert model.pos_embed.shape == (1, 8, 8, 8)
    model.pos_embed.data.normal_()
    x = torch.randn(1, 3, 48, 32)
    with_positions = model(x)
    assert model.no_weight_decay() == {"pos_embed"}
    model.pos_embed.data.zero_()
    assert (model(x) - with_positions).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "group"}, "norm must be one of 'layer', 'batch', got 'group'"),
        ({"stem": "v2"}, "stem must be one of"),
        ({"downsample": "v3"}, "downsample must be one of"),
        ({"dims": (8, 16), "depths": (1, 1, 1)}, "dims has 2 widths for the 3 stages of depths"),
        ({"mlp_act_layer": "swish"}, "mlp_act_layer must be one of"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        mambavision.create_model("vmamba_tiny_s1l8", **arguments)


SMALL_VARIANTS = [
    {"norm": "batch"},
    {"gmlp": True, "mlp_act_layer": "silu"},
    {"ssm_ratio": 0},
    {"mlp_ratio": 0},
    {"dims": (8, 12, 20, 28), "downsample": "conv2x2"},
    {"patch_norm": False, "stem": "patch", "downsample": "merge"},
]


@pytest.mark.parametrize("arguments", SMALL_VARIANTS, ids=str)
def test_options_of_the_model(arguments):
    model = mambavision.create_model(
        "vmamba_tiny_s1l8", **{"dims": 8, "depths": (1, 1, 1, 1), "num_classes": 3} | arguments
    )
    logits = model(torch.randn(2, 3, 70, 33))
    assert logits.shape == (2, 3)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
