"""MambaVision's recorded features and gradients, and what its variants are made of."""

import math

import numpy as np
import pytest
import torch

import mambavision
from parity import LOGITS_TOLERANCE, fill_, image, loss_and_gradient_norms, recorded


@pytest.fixture(scope="module", params=["T", "B"])
def filled(request):
    model = mambavision.create_model(f"mamba_vision_{request.param}")
    return fill_(model).eval(), *recorded(f"mambavision/{request.param}")


@torch.inference_mode()
def test_features(filled):
    model, manifest, arrays = filled
    final, features = model.forward_intermediates(image(1, 224, 224, seed=3))
    for index, (feature, expected) in enumerate(zip(features, manifest["stages_seed3"], strict=True)):
        assert list(feature.shape) == expected["shape"]
        assert feature.mean().item() == pytest.approx(expected["mean"], abs=1e-5)
        assert feature.std().item() == pytest.approx(expected["std"], abs=1e-5)
        np.testing.assert_allclose(
            feature.flatten()[:64], arrays[f"stage{index}_first64_seed3"], rtol=0, atol=LOGITS_TOLERANCE
        )
    pooled = model.forward_head(final, pre_logits=True)
    np.testing.assert_allclose(pooled, arrays["pooled_seed3"], rtol=0, atol=LOGITS_TOLERANCE)


@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"),
    [("train", torch.float32, 1e-4), ("eval", torch.float32, 1e-4), ("train", torch.float64, 1e-10)],
    ids=["training", "evaluation", "float64"],
)
def test_gradients(mode, dtype, tolerance):
    manifest, _ = recorded("mambavision/T_grad")
    expected = manifest["eval_mode"] if mode == "eval" else manifest["float64"] if dtype == torch.float64 else manifest
    model = fill_(mambavision.create_model("mamba_vision_T", drop_path_rate=0.0)).to(dtype).train(mode == "train")
    # The gradients of the stem cancel almost completely in training mode, and oneDNN's convolutions leave 5e-4 of noise
    # there on some processors; PyTorch's own do not.
    with torch.backends.mkldnn.flags(enabled=False):
        loss, norms = loss_and_gradient_norms(model, image(4, 224, 224, seed=4).to(dtype))
    assert loss == pytest.approx(expected["loss"], rel=tolerance)
    # Biases in front of a BatchNorm have no gradient but rounding noise while it uses batch statistics.
    noise = manifest["tolerance_hint"]["train_ignored_because_rounding_noise"] if mode == "train" else []
    for name, norm in expected["grad_l2"].items():
        assert name in noise or norms[name] == pytest.approx(norm, rel=tolerance), name
    assert norms.keys() == expected["grad_l2"].keys()
    if mode == "train" and dtype == torch.float32:
        buffers = dict(model.named_buffers())
        for name, (mean, std) in manifest["bn_running_mean_std_after"].items():
            assert buffers[name].mean().item() == pytest.approx(mean, abs=1e-5), name
            assert buffers[name].std().item() == pytest.approx(std, abs=1e-5), name


# From the table of the released variants: attention blocks of the last two stages.
ATTENTION_BLOCKS = {
    "mamba_vision_T": [4, 2],
    "mamba_vision_T2": [5, 2],
    "mamba_vision_S": [3, 2],
    "mamba_vision_B": [5, 2],
    "mamba_vision_B_21k": [5, 2],
    "mamba_vision_L": [5, 2],
    "mamba_vision_L_21k": [5, 2],
    "mamba_vision_L2": [6, 2],
    "mamba_vision_L2_512_21k": [6, 2],
    "mamba_vision_L3_256_21k": [10, 5],
    "mamba_vision_L3_512_21k": [10, 5],
}


@pytest.mark.parametrize("name", ATTENTION_BLOCKS)
def test_scans_come_before_attention(name):
    with torch.device("meta"):
        model = mambavision.create_model(name)
    blocks = [[hasattr(block.mixer, "qkv") for block in model.levels[stage].blocks] for stage in (2, 3)]
    assert [sum(stage) for stage in blocks] == ATTENTION_BLOCKS[name]
    assert all(stage == sorted(stage) for stage in blocks)
    side = model.pretrained_cfg["input_size"][-1]
    assert [model.levels[stage].window for stage in (2, 3)] == [side // 16, side // 32]


def test_initial_weights_are_those_of_the_published_trainings():
    model = mambavision.create_model("mamba_vision_T")
    mixers = [block.mixer for level in model.levels[2:] for block in level.blocks if hasattr(block.mixer, "A_log")]
    for mixer in mixers:
        torch.testing.assert_close(mixer.A_log, torch.arange(1.0, 9.0).log().expand_as(mixer.A_log))
        assert mixer.D.eq(1).all()
        assert mixer.dt_proj.bias.eq(0).all()
        assert mixer.dt_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
    rates = [block.drop_path.drop_prob for level in model.levels for block in level.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 16), atol=1e-7)


def test_declared_training_behaviour_is_available():
    declared = {"dt_init": "mamba", "decay_A_log": False, "drop_path_per_image": True, "drop_path_rate": 0.9}
    model = mambavision.create_model("mamba_vision_T", **declared).train()
    mixer = model.levels[2].blocks[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.99 <= dt.min() < dt.max() <= 0.1 * 1.01
    assert mixer.dt_proj.weight.abs().max() <= 1 / math.sqrt(mixer.dt_rank)
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if name.endswith("A_log")}

    block = model.levels[3].blocks[-1]
    tokens = torch.randn(3 * 4, 49, 640)  # three images of four windows
    is_dropped = torch.isclose(block(tokens, windows_per_image=4), tokens).flatten(1).all(1).view(3, 4)
    assert (is_dropped == is_dropped[:, :1]).all()


def test_optimizers_decay_what_they_did_in_the_published_trainings():
    from timm.optim import param_groups_weight_decay

    model = mambavision.create_model("mamba_vision_T", dim=16, in_dim=8, num_heads=(1, 1, 2, 4))
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), name
