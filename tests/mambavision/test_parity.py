"""Every architecture has the entries of released files and gives the recorded logits."""

import numpy as np
import pytest
import torch

import mambavision
from parity import LOGITS_TOLERANCE, condition_, fill_, image, recorded


def _fill_conditioned(model):
    return condition_(fill_(model))


# VMamba's have a standard deviation of 0.7, and differ by 1.4e-6 between two orders of adding up a scan. SegMAN's reach
# 14, and with weights as they come most of the model would hardly show in them.
RECORDED = {
    "mamba_vision_T": ("mambavision/T", fill_, LOGITS_TOLERANCE),
    "mamba_vision_B": ("mambavision/B", fill_, LOGITS_TOLERANCE),
    "mamba_vision_L3_256_21k": ("mambavision/L3_256_21k", fill_, LOGITS_TOLERANCE),
    "segman_encoder_t": ("segman/encoder_t", _fill_conditioned, LOGITS_TOLERANCE),
    "segman_encoder_s": ("segman/encoder_s", _fill_conditioned, LOGITS_TOLERANCE),
    "vmamba_tiny_s1l8": ("vmamba/tiny_s1l8", fill_, 7e-6),
}


@pytest.mark.parametrize("name", RECORDED)
def test_entries_are_those_of_released_files(name):
    manifest, _ = recorded(RECORDED[name][0])
    with torch.device("meta"):
        model = mambavision.create_model(name)
    entries = [
        [key, list(each.shape), str(each.dtype).removeprefix("torch.")] for key, each in model.state_dict().items()
    ]
    order = sorted if name.startswith("segman") else list  # whose scan is shared with VMamba, and its order
    assert order(entries) == order(manifest["entries"])
    assert sorted(name for name, _ in model.named_buffers()) == sorted(manifest["buffers"])
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["num_parameters"]


@pytest.mark.parametrize("name", RECORDED)
@torch.inference_mode()
def test_logits(name):
    folder, fill, tolerance = RECORDED[name]
    manifest, arrays = recorded(folder)
    with torch.device("meta"):  # initialising 740 M parameters would take longer than the test
        model = mambavision.create_model(name)
    model = fill(model.to_empty(device="cpu")).eval()
    checked = 0
    for key, about in manifest["arrays"].items():
        if key.startswith("logits"):
            batch, _, height, width, seed = about
            logits = model(image(batch, height, width, int(seed.removeprefix("seed="))))
            np.testing.assert_allclose(logits, arrays[key], rtol=0, atol=tolerance, err_msg=key)
            checked += 1
    assert checked == sum(key.startswith("logits") for key in arrays) > 0


# Parameters and entries, from the tables of the released variants.
VARIANTS = {
    "mamba_vision_T": (31_794_248, 252),
    "mamba_vision_T2": (35_104_008, 298),
    "mamba_vision_S": (50_140_584, 285),
    "mamba_vision_B": (97_685_288, 356),
    "mamba_vision_B_21k": (97_685_288, 356),
    "mamba_vision_L": (227_961_048, 356),
    "mamba_vision_L_21k": (227_961_048, 356),
    "mamba_vision_L2": (241_554_824, 389),
    "mamba_vision_L2_512_21k": (241_554_824, 389),
    "mamba_vision_L3_256_21k": (739_570_472, 601),
    "mamba_vision_L3_512_21k": (739_570_472, 601),
    "vanilla_vmamba_tiny": (22_893_448, 212),
    "vanilla_vmamba_small": (44_417_416, 446),
    "vanilla_vmamba_base": (76_254_056, 446),
    "segman_encoder_t": (3_506_014, 379),
    "segman_encoder_s": (25_507_582, 633),
    "segman_encoder_b": (45_020_682, 1173),
    "segman_encoder_l": (80_985_272, 1563),
    "segman_encoder_l2": (80_978_132, 1485),
    "vmamba_tiny_s1l8": (30_249_064, 276),
    "vmamba_small_s1l20": (49_012_840, 492),
    "vmamba_base_s1l20": (86_614_504, 492),
    "vmamba_tiny_s2l5": (30_705_832, 222),
    "vmamba_small_s2l15": (50_147_752, 402),
    "vmamba_base_s2l15": (88_557_800, 402),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_the_published_size(name):
    with torch.device("meta"):
        model = mambavision.create_model(name)
    assert (sum(each.numel() for each in model.parameters()), len(model.state_dict())) == VARIANTS[name]


def test_all_variants_are_registered():
    assert set(mambavision.list_models()) == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_norms_have_the_original_epsilon(name):
    """A wrong one moves the logits by less than their tolerance."""
    with torch.device("meta"):
        model = mambavision.create_model(name)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms
    assert {norm.eps for norm in norms} == {1e-6 if name.startswith("segman") else 1e-5}
