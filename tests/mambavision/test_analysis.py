"""Receptive fields and maps of scans and attention, and the programs that draw them."""

import numpy as np
import pytest
import torch
from torch import nn

import mambavision
from mambavision.analysis import (
    Layout,
    MapKind,
    attention_maps,
    block_name,
    cell_of_point,
    display_scale,
    map_of_point,
    receptive_field,
    receptive_field_maps,
    record_blocks,
    rollout,
    smallest_square,
)
from mambavision.errors import UserError
from parity import DATA, fill_, image, recorded
from small_models import SMALL
from vision_kernels import ss2d


@pytest.fixture(scope="module")
def tiny():
    return fill_(mambavision.create_model("vmamba_tiny_s1l8")).eval()


# Against numbers of the original


def test_attention_maps_are_the_originals(tiny):
    expected = dict(np.load(DATA / "vmamba" / "analysis_attention.npz"))
    (record,) = record_blocks(tiny, image(1, 128, 128, seed=6), ["layers.2.blocks.1.op"])
    maps = attention_maps(record, map(MapKind.parse, expected))
    assert list(maps) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(maps[name][0, 0], values, atol=2e-5, err_msg=name)


def test_receptive_field_is_the_originals(tiny):
    facts, expected = recorded("vmamba/analysis")[0]["erf"], dict(np.load(DATA / "vmamba" / "analysis_erf.npz"))
    field = receptive_field(tiny, (image(1, 128, 128, seed=seed) for seed in (20, 21, 22)))
    assert (field.images, field.skipped) == (3, 0)
    np.testing.assert_allclose(field.map, expected["avg"], atol=5e-5)
    np.testing.assert_allclose(display_scale(field.map), expected["normalised"], atol=2e-4)
    for share, side in facts["rectangles"].items():
        assert smallest_square(field.map, float(share)) == (side, side**2 / 128**2)


# Receptive fields


def test_batches_and_single_images_give_the_same_field(small_model):
    images = image(3, 64, 96)
    together = receptive_field(small_model.train(), [images])
    assert small_model.training
    one_by_one = receptive_field(small_model, images.split(1), stage=3)
    torch.testing.assert_close(together.map, one_by_one.map, atol=1e-6, rtol=1e-3)
    assert together.map.shape == (64, 96)


def test_models_of_timm_have_receptive_fields():
    model = mambavision.create_model("test_resnet").eval()
    near, far = (receptive_field(model, [image(1, 96, 96)], stage).map for stage in (1, -1))
    assert smallest_square(near, 0.99)[0] < smallest_square(far, 0.99)[0]


def test_maps_that_are_not_finite_are_left_out(small_model):
    images = image(2, 64, 64)
    images[0, 0, 0, 0] = torch.nan
    field = receptive_field(small_model, [images])
    assert (field.images, field.skipped) == (1, 1)
    assert field.map.isfinite().all()
    with pytest.raises(UserError, match="none of 1 images has a finite gradient"):
        receptive_field(small_model, [images[:1]])


def test_wrong_stages_are_named(small_model):
    with pytest.raises(UserError, match=r"has no stage 4; it has 4, 0 to 3\."):
        receptive_field_maps(small_model, image(1, 64, 64), stage=4)
    with pytest.raises(UserError, match="Linear: has no intermediate features"):
        receptive_field_maps(nn.Linear(1, 1), image(1, 64, 64))


def test_squares():
    assert smallest_square(torch.ones(9, 12), 0.2) == (5, 25 / 108)
    assert smallest_square(torch.ones(9, 12), 25 / 108) == (7, 49 / 108)  # more than the share, not as much
    assert smallest_square(torch.ones(9, 12), 0.9) is None
    assert smallest_square(torch.eye(7)[:, [3]] * torch.eye(7)[3], 0.999) == (3, 9 / 49)


# Scans


class Scanning(nn.Module):
    """A "model" that is one channel's scan."""

    def __init__(self, routes):
        super().__init__()
        self.routes = routes
        self.scan = nn.Module()
        self.scan.forward = self.run
        self.weights = [torch.randn(4, 5, 1), torch.randn(4, 1, 1), torch.randn(4, 1)]
        self.A, self.D = -torch.rand(4, 2) * 3, torch.randn(4)

    def run(self, x):
        return ss2d(x, *self.weights, self.A, self.D, routes=self.routes)

    def forward(self, x):
        return self.scan(x)


@pytest.mark.parametrize("routes", ["cross", "unidirectional", "bidirectional"])
def test_the_map_of_everything_is_the_scan(routes):
    """On a map that is no square, longer than the rows that are computed at once."""
    model, x = Scanning(routes), torch.randn(2, 1, 5, 11)
    (record,) = record_blocks(model, x, ["scan"])
    assert record.layout == Layout(5, 11, (5, 11))
    matrix = attention_maps(record, [MapKind("CwBdtw", "all", "none")])["all_CwBdtw"]
    scanned = (matrix[:, 0] @ x.flatten(2).transpose(1, 2))[..., 0] + model.D.sum() * x.flatten(1)
    torch.testing.assert_close(scanned, model(x).flatten(1), atol=1e-4, rtol=1e-4)


def test_long_decays_do_not_underflow():
    """The states of the original's w are zero here; what one position takes from the last ones is not."""
    model, x = Scanning("unidirectional"), torch.randn(1, 1, 20, 20)
    model.A *= 20
    (record,) = record_blocks(model, x, ["scan"])
    decay = attention_maps(record, [MapKind("ww", 0, "none")])["a0_ww"][0, 0]
    assert torch.equal(decay.diagonal(), torch.full((400,), 2.0))  # of two states
    expected = (record.delta[0, 0, 0, 1:, None].double() * record.A[0, 0].double()).exp().sum(1)
    torch.testing.assert_close(decay.diagonal(-1).double(), expected, atol=1e-5, rtol=1e-3)
    assert not decay.isnan().any()


def test_windows_of_mambavision():
    model = fill_(mambavision.create_model("mamba_vision_T", **SMALL["mamba_vision_T"])).eval()
    images, inputs = image(2, 96, 64), []
    model.levels[2].blocks[0].mixer.x_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    (record,) = record_blocks(model, images, ["levels.2.blocks.0"])
    assert record.layout == Layout(6, 4, (4, 4))
    assert record.layout.windows == (2, 1)
    maps = attention_maps(record, [MapKind("CB", 0, "none")])["a0_CB"]
    mixer = model.levels[2].blocks[0].mixer
    _, B, C = mixer.x_proj(inputs[0]).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    expected = (C @ B.transpose(1, 2)).tril().unflatten(0, (2, 2))
    torch.testing.assert_close(maps, expected)
    taken = map_of_point(maps, record.layout, (0.6, 0.9))  # row 5, column 2: the second window, over padding
    assert cell_of_point(record.layout, (0.6, 0.9)) == (5, 2)
    assert taken[:, :4].isnan().all()
    torch.testing.assert_close(taken[:, 4:], expected[:, 1, 6, :8].unflatten(-1, (2, 4)))


def test_softmax_attention_of_vision_transformers():
    model = mambavision.create_model("test_vit").eval()
    model.set_input_size((64, 96))
    images, kept = image(1, 64, 96), []
    attention = model.blocks[1].attn
    attention.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    name = block_name(model, 2, 1)
    (record,) = record_blocks(model, images, [name])
    query, key, _ = attention.qkv(kept[0]).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    expected = (query @ key.transpose(-1, -2) * attention.scale).softmax(-1)[..., 1:, 1:].mean(1)
    maps = attention_maps(record)
    torch.testing.assert_close(maps["softmax"][:, 0], expected, atol=1e-5, rtol=1e-4)
    assert map_of_point(maps["softmax"], record.layout, (1, 1)).shape == (1, 4, 6)


def test_recording_leaves_the_model_as_it_was(small_model):
    name = block_name(small_model, 2, 0)
    images = image(1, 64, 64)
    before = small_model(images)
    record_blocks(small_model.train(), images, [name])
    assert small_model.training
    assert not any(module._forward_pre_hooks for module in small_model.modules())
    torch.testing.assert_close(small_model.eval()(images), before)


def test_names_of_maps():
    for name in ("a0_CB", "ao3_norm_CwBw", "all_absnorm_ww", "nall_norm_CBdt", "a1_CwBdtw"):
        assert str(MapKind.parse(name)) == name
    assert MapKind.parse("ao2_absnorm_ww") == MapKind("ww", 2, "absnorm", in_order_of_route=True)
    for wrong in ("CB", "a0", "a0_norm", "aoall_CB", "a0_max_CB", "a0_norm_BC"):
        with pytest.raises(UserError, match=f"unknown map '{wrong}': write a route"):
            MapKind.parse(wrong)
    with pytest.raises(ValueError, match="mode must be one of"):
        MapKind("BC")
    with pytest.raises(ValueError, match="for a single route"):
        MapKind("CB", "all", in_order_of_route=True)


def test_normalisation_and_the_order_of_routes(tiny):
    names = ["a1_CB", "ao1_CB", "a1_absnorm_CB", "a2_norm_CB", "all_CB", "a0_CB", "a2_CB", "a3_CB"]
    (record,) = record_blocks(tiny, image(2, 64, 96, seed=1), ["layers.2.blocks.0"])
    maps = attention_maps(record, map(MapKind.parse, names))
    order = torch.arange(24).view(4, 6).T.flatten()  # columns of a map of 4x6
    torch.testing.assert_close(maps["a1_CB"][:, :, order][..., order], maps["ao1_CB"])
    assert maps["a1_absnorm_CB"].amax(dim=(1, 2, 3)).tolist() == [1, 1]
    assert maps["a2_norm_CB"].amin(dim=(1, 2, 3)).tolist() == [0, 0]
    torch.testing.assert_close(maps["all_CB"], sum(maps[f"a{route}_CB"] for route in range(4)))
    with pytest.raises(UserError, match=r"map a4_CB: the scan has 4 routes, counted from 0\."):
        attention_maps(record, [MapKind.parse("a4_CB")])


def test_rollout_keeps_what_rows_pass_on():
    first, second = torch.rand(2, 3, 5, 5), torch.rand(2, 3, 5, 5)
    combined = rollout([first, second])
    torch.testing.assert_close(combined.sum(-1), torch.ones(2, 3, 5))
    one, two = ((each[1, 2] + torch.eye(5)).double() for each in (first, second))
    expected = (two / two.sum(1)[:, None]) @ (one / one.sum(1)[:, None])
    torch.testing.assert_close(combined[1, 2].double(), expected)
    with pytest.raises(ValueError, match="without negative values"):
        rollout([first - 1])


@pytest.mark.parametrize(
    ("model", "arguments", "name", "message"),
    [
        ("vmamba_tiny_s1l8", {}, "layers.2.block.1", r"has no module 'layers\.2\.block\.1'\. Did you mean"),
        ("vmamba_tiny_s1l8", {}, "layers.1.downsample", "layers.1.downsample of VMamba: has neither"),
        ("vmamba_tiny_s1l8", {"routes": "cascade"}, "layers.2.blocks.1", "has 2 consecutive scans"),
        ("mamba_vision_T", {}, "levels.0.blocks.0", "has neither a selective scan nor fused attention"),
    ],
)
def test_what_has_no_map_is_refused(model, arguments, name, message):
    model = mambavision.create_model(model, **SMALL.get(model, {}), **arguments)
    with pytest.raises(UserError, match=message):
        record_blocks(model, image(1, 64, 64), [name])


def test_tokens_without_a_known_place_are_refused():
    wrapped = nn.Sequential(mambavision.create_model("test_vit"))
    with pytest.raises(UserError, match=r"0\.blocks\.1 of Sequential: the places of its tokens"):
        record_blocks(wrapped, image(1, *wrapped[0].pretrained_cfg["input_size"][1:]), ["0.blocks.1"])


def test_blocks_by_number(small_model):
    with pytest.raises(UserError, match=r"has no stage 4; it has 4, counted from 0\."):
        block_name(small_model, 4, 0)
    with pytest.raises(UserError, match=r"stage 1 of \w+: has no block 1; it has 1, counted from 0\."):
        block_name(small_model, 1, 1)
    with pytest.raises(UserError, match=r"ResNet: has no block 0; it has 0"):
        block_name(mambavision.create_model("test_resnet"), 0, 0)


# Programs
