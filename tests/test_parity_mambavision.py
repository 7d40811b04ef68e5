"""MambaVision gives the recorded numbers: keys, logits, features and gradients."""

import math

import numpy as np
import pytest
import torch

import mambavision
from parity import fill_, image, recorded

TOLERANCE = 1e-4  # of logits whose standard deviation is about 3


@pytest.fixture(scope="module", params=["T", "B"])
def filled(request):
    model = mambavision.create_model(f"mamba_vision_{request.param}")
    return fill_(model).eval(), *recorded(f"mambavision/{request.param}")


@pytest.mark.parametrize("variant", ["T", "B", "L3_256_21k"])
def test_entries_are_those_of_released_files(variant):
    manifest, _ = recorded(f"mambavision/{variant}")
    with torch.device("meta"):
        model = mambavision.create_model(f"mamba_vision_{variant}")
    entries = [
        [key, list(each.shape), str(each.dtype).removeprefix("torch.")] for key, each in model.state_dict().items()
    ]
    assert entries == manifest["entries"]
    assert [name for name, _ in model.named_buffers()] == manifest["buffers"]
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["num_parameters"]


@torch.inference_mode()
def test_logits(filled):
    model, manifest, arrays = filled
    checked = 0
    for name, about in manifest["arrays"].items():
        if name.startswith("logits"):
            batch, _, height, width, seed = about
            logits = model(image(batch, height, width, int(seed.removeprefix("seed="))))
            np.testing.assert_allclose(logits, arrays[name], rtol=0, atol=TOLERANCE, err_msg=name)
            checked += 1
    assert checked == sum(name.startswith("logits") for name in arrays) > 0


@torch.inference_mode()
def test_features(filled):
    model, manifest, arrays = filled
    final, features = model.forward_intermediates(image(1, 224, 224, seed=3))
    for index, (feature, expected) in enumerate(zip(features, manifest["stages_seed3"], strict=True)):
        assert list(feature.shape) == expected["shape"]
        assert feature.mean().item() == pytest.approx(expected["mean"], abs=1e-5)
        assert feature.std().item() == pytest.approx(expected["std"], abs=1e-5)
        np.testing.assert_allclose(
            feature.flatten()[:64], arrays[f"stage{index}_first64_seed3"], rtol=0, atol=TOLERANCE
        )
    pooled = model.forward_head(final, pre_logits=True)
    np.testing.assert_allclose(pooled, arrays["pooled_seed3"], rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_logits_of_the_largest_model():
    manifest, arrays = recorded("mambavision/L3_256_21k")
    with torch.device("meta"):  # 740 M parameters: initialising them would take longer than the test
        model = mambavision.create_model("mamba_vision_L3_256_21k")
    model = fill_(model.to_empty(device="cpu")).eval()
    batch, _, height, width, seed = manifest["arrays"]["logits"]
    logits = model(image(batch, height, width, int(seed.removeprefix("seed="))))
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=TOLERANCE)


def _loss_and_gradients(mode, dtype):
    model = fill_(mambavision.create_model("mamba_vision_T", drop_path_rate=0.0)).to(dtype).train(mode == "train")
    # The gradients of the stem cancel almost completely in training mode, and oneDNN's convolutions leave 5e-4 of noise
    # there on some processors; PyTorch's own do not.
    with torch.backends.mkldnn.flags(enabled=False):
        loss = model(image(4, 224, 224, seed=4).to(dtype)).square().mean()
        loss.backward()
    return (
        model,
        loss.item(),
        {
            # float32 norms of large tensors are off by 1e-4
            name: each.grad.double().norm().item()
            for name, each in model.named_parameters()
        },
    )


@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"),
    [("train", torch.float32, 1e-4), ("eval", torch.float32, 1e-4), ("train", torch.float64, 1e-10)],
    ids=["training", "evaluation", "float64"],
)
def test_gradients(mode, dtype, tolerance):
    manifest, _ = recorded("mambavision/T_grad")
    expected = manifest["eval_mode"] if mode == "eval" else manifest["float64"] if dtype == torch.float64 else manifest
    model, loss, norms = _loss_and_gradients(mode, dtype)
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


def test_layer_norms_have_the_original_epsilon():
    """A wrong one moves the logits by less than their tolerance."""
    with torch.device("meta"):
        model = mambavision.create_model("mamba_vision_T")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}


# From the table of the released variants: parameters, entries, attention blocks of the last two stages.
VARIANTS = {
    "mamba_vision_T": (31_794_248, 252, 4, 2),
    "mamba_vision_T2": (35_104_008, 298, 5, 2),
    "mamba_vision_S": (50_140_584, 285, 3, 2),
    "mamba_vision_B": (97_685_288, 356, 5, 2),
    "mamba_vision_B_21k": (97_685_288, 356, 5, 2),
    "mamba_vision_L": (227_961_048, 356, 5, 2),
    "mamba_vision_L_21k": (227_961_048, 356, 5, 2),
    "mamba_vision_L2": (241_554_824, 389, 6, 2),
    "mamba_vision_L2_512_21k": (241_554_824, 389, 6, 2),
    "mamba_vision_L3_256_21k": (739_570_472, 601, 10, 5),
    "mamba_vision_L3_512_21k": (739_570_472, 601, 10, 5),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_the_published_size(name):
    with torch.device("meta"):
        model = mambavision.create_model(name)
    parameters, entries, *attention = VARIANTS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    blocks = [[hasattr(block.mixer, "qkv") for block in model.levels[stage].blocks] for stage in (2, 3)]
    assert [sum(stage) for stage in blocks] == attention
    assert all(stage == sorted(stage) for stage in blocks)  # scans first
    side = model.pretrained_cfg["input_size"][-1]
    assert [model.levels[stage].window for stage in (2, 3)] == [side // 16, side // 32]


def test_all_variants_are_registered():
    assert mambavision.list_models("mamba_vision*") == sorted(VARIANTS, key=str.lower)


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
