"""SegMAN's recorded gradients, and what its encoders are made of."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mambavision
from mambavision.models.segman import LayerScale, RotaryEmbedding, TokenMixer, rotate
from parity import condition_, fill_, image, loss_and_gradient_norms, recorded


@pytest.mark.parametrize("variant", ["t", "s"])
def test_frequencies_of_positions(variant):
    _, arrays = recorded(f"segman/encoder_{variant}")
    state_dict = mambavision.create_model(f"segman_encoder_{variant}").state_dict()
    keys = [name for name in arrays if name.startswith("constructed/")]
    assert len(keys) == 4
    for key in keys:
        np.testing.assert_allclose(state_dict[key.removeprefix("constructed/")], arrays[key], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
def test_gradients(dtype, tolerance):
    manifest, _ = recorded("segman/encoder_t_grad")
    suffix = "_f64" if dtype == torch.float64 else ""
    model = condition_(fill_(mambavision.create_model("segman_encoder_t"))).to(dtype).train()
    loss, norms = loss_and_gradient_norms(model, image(2, 224, 224, seed=4).to(dtype))
    assert loss == pytest.approx(manifest["loss" + suffix], rel=1e-6 if dtype == torch.float32 else 1e-10)
    expected = manifest["grad_l2" + suffix]
    assert norms.keys() == expected.keys()
    for name, norm in expected.items():
        # Shifts in front of a batch norm have no gradient but rounding noise.
        assert name in manifest["noise_dominated"] or norms[name] == pytest.approx(norm, rel=tolerance), name


def test_rotation_turns_pairs_by_row_and_column():
    rope = RotaryEmbedding(8)
    torch.testing.assert_close(rope.angle, torch.tensor([1.0, 1.0, 1e-4, 1e-4]))
    row, column = 2, 3
    x = torch.randn(2, 1, 8)  # query and key
    turned = rotate(x, *(each[row, column] for each in rope(3, 4)))
    angles = torch.tensor([row * 1.0, row * 1e-4, column * 1.0, column * 1e-4])
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(4), angles)
    expected = torch.view_as_real(pairs).flatten(-2) * torch.tensor([8**-0.5, 1.0])[:, None, None]
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("side", [1, 2, 4, 6])
def test_windows_shrink_on_small_maps(side):
    """To the largest odd ones that fit, with the biases of the positions that are left."""
    mixer = TokenMixer(8, 2, 5, is_global=False)
    torch.nn.init.normal_(mixer.rpb[0])
    query, key, value = torch.randn(3, 1, 2, side, side + 3, 4)
    attended = mixer._attend_locally(query, key, value)
    if side <= 3 and side % 2:  # a window of all rows: plain attention to the columns in reach
        row, column = side // 2, (side + 3) // 2
        reach = side // 2
        keys, values = (each[0, :, :, column - reach : column + reach + 1] for each in (key, value))
        bias = mixer.rpb[0][:, 4 - reach : 4 + reach + 1, 4 - reach : 4 + reach + 1]
        logits = torch.einsum("hd,hijd->hij", query[0, :, row, column], keys) + bias
        weights = logits.flatten(1).softmax(1)
        expected = torch.einsum("hl,hld->hd", weights, values.flatten(1, 2))
        torch.testing.assert_close(attended[0, :, row, column], expected)
    assert attended.shape == query.shape


@torch.inference_mode()
def test_global_bias_is_resized_like_a_picture():
    mixer = TokenMixer(8, 2, 3, is_global=True)
    torch.nn.init.normal_(mixer.rpb[1])
    query, key, value = torch.randn(3, 2, 2, 4, 5, 4)
    attended = mixer._attend_globally(query, key, value)
    bias = F.interpolate(mixer.rpb[1][None], (20, 20), mode="bicubic", align_corners=False)
    logits = query.flatten(2, 3) @ key.flatten(2, 3).transpose(2, 3) + bias
    torch.testing.assert_close(attended.flatten(2, 3), logits.softmax(-1) @ value.flatten(2, 3))


def test_initial_weights():
    model = mambavision.create_model("segman_encoder_b", depths=(1, 1, 1, 1), drop_path_rate=0.3)
    block = model.layers[0].blocks[0]
    assert block.token_mixer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.patch_embed[3].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(bias.any() for bias in block.token_mixer.rpb)
    assert not block.cpe1.bias.any()
    assert isinstance(block.layer_scale1, LayerScale)
    assert block.layer_scale1.weight.eq(1e-6).all()
    assert block.token_mixer.ssm.A_logs.eq(0).all()
    rates = [stage.blocks[0].drop_path.drop_prob for stage in model.stages]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 4), atol=1e-7)
    assert not isinstance(mambavision.create_model("segman_encoder_t").layers[0].blocks[0].layer_scale1, LayerScale)


def test_freezing_by_depth_keeps_what_leads_on_with_its_stage():
    from timm.models import group_parameters

    with torch.device("meta"):
        model = mambavision.create_model("segman_encoder_t")
    groups = group_parameters(model, model.group_matcher(coarse=True))
    assert {name.split(".")[1] for name in groups[1]} == {"0", "1"}
    assert {name.split(".")[1] for name in groups[4]} >= {"6"}
