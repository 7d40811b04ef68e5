"""VMamba under the original's name: recorded numbers, the meaning of the original's arguments, and weights."""

import inspect
import itertools
import logging

import numpy as np
import pytest
import torch
from torch import nn

import mambavision
from checkout import ROOT
from mambavision.errors import CheckpointError
from mambavision.models import VMamba
from mambavision.openmmlab import MM_VSSM
from mambavision.openmmlab.backbones.features import BackboneArgumentError
from mambavision.openmmlab.backbones.vssm import scan_arguments, vmamba_arguments
from mambavision.openmmlab.config import load_config
from parity import fill_, image, recorded
from small_models import SMALL

SIZE = {"dims": 16, "depths": (1, 1, 2, 1)}
# What all published backbones of detection and segmentation have in common.
PUBLISHED = {
    "type": "MM_VSSM", "mlp_ratio": 4.0, "ssm_d_state": 1, "ssm_dt_rank": "auto", "ssm_conv": 3, "ssm_conv_bias": False,
    "forward_type": "v05_noz", "patchembed_version": "v2", "downsample_version": "v3", "norm_layer": "ln2d",
}  # fmt: skip
FIELDS = ("dims", "depths", "ssm_ratio", "drop_path_rate", "pretrained")
SIZES = {
    "tiny": (96, (2, 2, 8, 2), 1.0, 0.2, "vmamba_tiny_s1l8"),
    "tiny1": (96, (2, 2, 5, 2), 2.0, 0.2, "vmamba_tiny_s2l5"),
    "small": (96, (2, 2, 15, 2), 2.0, 0.3, "vmamba_small_s2l15"),
    "base": (128, (2, 2, 15, 2), 2.0, 0.6, "vmamba_base_s2l15"),
}
CONFIGS = [path for path in sorted(ROOT.glob("*/configs/vmamba/*.py")) if not path.stem.endswith("digits")]


def arguments(size):
    """The arguments of a published backbone."""
    return {**PUBLISHED, **dict(zip(FIELDS, SIZES[size], strict=True))}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_backbones_of_configs(path):
    (size,) = SIZES.keys() & set(path.stem.split("_"))
    assert load_config(path).model.backbone == arguments(size)


@pytest.fixture(scope="module")
def tiny():
    keywords = {key: value for key, value in arguments("tiny").items() if key != "type"}
    return fill_(MM_VSSM(**keywords)).eval()


def test_entries_are_the_originals(tiny):
    manifest, _ = recorded("vmamba/backbone_tiny_features")
    entries = [[key, list(value.shape), str(value.dtype)[6:]] for key, value in tiny.state_dict().items()]
    assert entries == manifest["entries"]
    assert not list(tiny.buffers())
    assert sum(parameter.numel() for parameter in tiny.parameters()) == manifest["num_parameters"] == 29_481_408


@torch.inference_mode()
def test_features_are_the_originals(tiny):
    manifest, arrays = recorded("vmamba/backbone_tiny_features")
    maps = tiny(image(1, 256, 320, seed=5))
    for index, (features, level) in enumerate(zip(maps, manifest["levels"], strict=True)):
        assert list(features.shape) == level["shape"]
        assert features.is_contiguous()
        assert features.mean().item() == pytest.approx(level["mean"], abs=1e-6)
        assert features.std(correction=0).item() == pytest.approx(level["std"], abs=1e-6)
        np.testing.assert_allclose(features.flatten()[:64], arrays[f"level{index}_first64"], rtol=0, atol=5e-5)


# What the original's arguments mean

NAMED = {
    "ssm_init=v1": {"ssm_init": "normal"},
    "ssm_init=v2": {"ssm_init": "uniform"},
    "norm_layer=ln2d": {"norm": "layer"},
    "norm_layer=bn": {"norm": "batch"},
    "downsample_version=v1": {"downsample": "merge"},
    "downsample_version=v3": {"downsample": "conv3x3"},
    "patchembed_version=v2": {"stem": "overlapping"},
}


def test_defaults_are_the_originals():
    own = {name: parameter.default for name, parameter in inspect.signature(VMamba).parameters.items()}
    expected = {
        "patch_size": 4, "in_chans": 3, "depths": (2, 2, 9, 2), "dims": 96, "ssm_d_state": 16, "ssm_ratio": 2.0,
        "ssm_dt_rank": "auto", "ssm_act_layer": "silu", "ssm_conv": 3, "ssm_conv_bias": True, "ssm_drop_rate": 0.0,
        "ssm_init": "mamba", "routes": "cross", "gate": True, "gate_act": True, "out_norm": "layer", "out_act": False,
        "mlp_ratio": 4.0, "mlp_act_layer": "gelu", "gmlp": False, "drop_rate": 0.0, "drop_path_rate": 0.1,
        "norm": "layer", "patch_norm": True, "stem": "patch", "downsample": "conv2x2", "pos_embed_size": None,
    }  # fmt: skip
    resolved = {**own, **vmamba_arguments({})}
    assert {name: resolved[name] for name in expected} == expected


@pytest.mark.parametrize("written", NAMED)
def test_versions_have_names_here(written):
    keyword, value = written.split("=")
    assert vmamba_arguments({keyword: value}).items() >= NAMED[written].items()


def test_other_keywords():
    given = {"mlp_drop_rate": 0.3, "posembed": True, "imgsize": 64, "ssm_rank_ratio": 3.0, "num_classes": 7}
    translated = vmamba_arguments({**given, **SIZE})
    assert (translated["drop_rate"], translated["pos_embed_size"], translated["dims"]) == (0.3, (64, 64), 16)
    assert translated.keys() <= inspect.signature(VMamba).parameters.keys()
    assert not {"ssm_rank_ratio", "num_classes", "posembed"} & translated.keys()


@pytest.mark.parametrize("core", ["v01", "v02", "v03", "v04", "v05", "v2", "v3"])
def test_cross_scans(core):
    assert scan_arguments(core) == {"routes": "cross", "gate": True}
    assert scan_arguments(f"{core}_noz") == {"routes": "cross", "gate": False}


@pytest.mark.parametrize(
    ("core", "routes"), [("v051d", "unidirectional"), ("v052d", "bidirectional"), ("v052dc", "cascade")]
)
def test_other_routes(core, routes):
    assert scan_arguments(f"{core}_noz") == {"routes": routes, "gate": False}


@pytest.mark.parametrize("core", ["v0", "v0seq"])
def test_vanilla_scan_has_its_gate_activation_and_bias(core):
    translated = vmamba_arguments({"forward_type": core, "ssm_act_layer": "relu", "ssm_conv_bias": False})
    expected = {"routes": "cross", "gate": True, "ssm_act_layer": "silu", "ssm_conv_bias": True}
    assert translated.items() >= expected.items()


def test_postfixes_in_any_order():
    for postfixes in itertools.permutations(["_ondwconv3", "_noz", "_oact", "_no32"]):
        assert scan_arguments("v05" + "".join(postfixes)) == {
            "routes": "cross", "gate": False, "out_act": True, "out_norm": "depthwise"
        }  # fmt: skip
    for postfix, norm in (
        ("none", "none"),
        ("cnorm", "layer_depthwise"),
        ("softmax", "softmax"),
        ("sigmoid", "sigmoid"),
    ):
        assert scan_arguments(f"v3_on{postfix}_nozact") == {
            "routes": "cross", "gate": True, "gate_act": False, "out_norm": norm
        }  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ({"forward_type": "xv1a"}, r"forward_type 'xv1a': 'xv1a' is none of v0, v0seq, .*Did you mean 'v01'\?"),
        ({"forward_type": "m0_noz"}, r"'m0' is none of .*Did you mean 'v0'\?"),
        ({"forward_type": "v05_nozz"}, r"there is no postfix '_nozz'\. Did you mean '_noz'\?"),
        ({"forward_type": "v0_noz"}, "v0 takes no postfixes; v05 is the same scan"),
        ({"forward_type": "v05_onnone_onsoftmax"}, "names two output norms"),
        ({"ssm_init": "v3"}, "ssm_init must be one of v0, v1, v2, got 'v3'"),
        ({"downsample_version": "none"}, "downsample_version must be one of"),
        ({"norm_layer": "gn"}, "norm_layer must be one of ln, ln2d, bn"),
        ({"ssm_act_layer": "tanh"}, "MM_VSSM: ssm_act_layer must be one of"),
        ({"dims": [16, 32]}, "dims has 2 widths for the 4 stages"),
        ({"ssm_dstate": 1}, r"MM_VSSM has no argument 'ssm_dstate'\. Did you mean 'ssm_d_state'\?"),
        ({"window_size": 7}, "MM_VSSM has no argument 'window_size'"),
        ({"out_indices": (0, 4)}, "out_indices must list stages"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused(argument, complaint):
    with pytest.raises(BackboneArgumentError, match=complaint):
        MM_VSSM(**{**SIZE, **argument})


def test_vanilla_backbone_is_the_registered_model():
    keywords = {"forward_type": "v0", "mlp_ratio": 0.0, "downsample_version": "v1", "ssm_d_state": 4}
    backbone = fill_(MM_VSSM(**SIZE, **keywords, out_indices=())).eval()
    model = fill_(mambavision.create_model("vanilla_vmamba_tiny", **SMALL["vanilla_vmamba_tiny"])).eval()
    assert backbone.state_dict().keys() == {key for key in model.state_dict() if not key.startswith("classifier.")}
    x = image(1, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model.classifier.norm(backbone(x)), model.forward_features(x))


def test_config_of_the_original_is_understood_as_it_does(caplog):
    """Its configs inherit a Swin's arguments, of which its backbone takes what it knows."""
    inherited = {
        "embed_dims": 96, "num_heads": [3, 6, 12, 24], "window_size": 7, "qkv_bias": True, "qk_scale": None,
        "drop_rate": 0.5, "attn_drop_rate": 0.5, "with_cp": True, "convert_weights": True,
        "init_cfg": {"type": "Pretrained", "checkpoint": "swin.pth"},
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        backbone = MM_VSSM(**SIZE, **inherited, patch_norm=False, drop_path_rate=0.7, pretrained="")
        backbone.init_weights()
    assert all(name in caplog.text for name in inherited)
    assert "patch_norm" not in caplog.text
    assert "drop_path_rate" not in caplog.text
    assert "no pretrained weights" in caplog.text
    assert isinstance(backbone.patch_embed[2], nn.Identity)
    assert backbone.layers[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.7)
    assert not backbone.layers[0].grad_checkpointing
    with pytest.raises(BackboneArgumentError, match="no argument 'drop_pth_rate'"):
        MM_VSSM(**SIZE, **inherited, drop_pth_rate=0.1)


def test_norms_and_stages():
    backbone = MM_VSSM(**SIZE, out_indices=(1, 3), norm_layer="bn", use_checkpoint=True).eval()
    assert isinstance(backbone.outnorm1, nn.BatchNorm2d)
    assert isinstance(backbone.patch_embed[2], nn.BatchNorm2d)
    assert all(stage.grad_checkpointing for stage in backbone.layers)
    assert [features.shape[1] for features in backbone(torch.randn(1, 3, 64, 64))] == [32, 128]


def test_learned_positions_take_part():
    backbone = MM_VSSM(**SIZE, posembed=True, imgsize=64).eval()
    assert backbone.pos_embed.shape == (1, 16, 16, 16)
    x = torch.randn(1, 3, 96, 64)
    before = backbone(x)[0]
    nn.init.normal_(backbone.pos_embed)
    assert not torch.allclose(backbone(x)[0], before)


# Weights


@pytest.fixture
def weights(tmp_path):
    """The file of a classifier as the original writes it, and its weights."""
    model = fill_(mambavision.create_model("vmamba_tiny_s1l8", **SMALL["vmamba_tiny_s1l8"]))
    path = tmp_path / "vssm.pth"
    mambavision.save_checkpoint({"model": model.state_dict(), "epoch": 3}, path)
    return str(path), model.state_dict()


SMALL_TINY = {key: value for key, value in arguments("tiny").items() if key not in ("type", "pretrained")} | SIZE


def test_weights_of_a_classifier_are_taken(weights):
    path, expected = weights
    backbone = MM_VSSM(**SMALL_TINY, pretrained=path)
    backbone.init_weights()
    own = {key: value for key, value in backbone.state_dict().items() if not key.startswith("outnorm")}
    assert own.keys() == {key for key in expected if not key.startswith("classifier.")}
    assert all(torch.equal(value, expected[key]) for key, value in own.items())


def test_weights_of_another_model_are_refused(weights):
    path, _ = weights
    with pytest.raises(CheckpointError, match=r"vssm\.pth: belongs to another model than .*of another shape"):
        MM_VSSM(**{**SMALL_TINY, "ssm_ratio": 2.0}, pretrained=path).init_weights()


@pytest.mark.parametrize("size", SIZES)
def test_released_weights_are_of_the_backbone(size):
    """The names and shapes of the registered model that a config's `pretrained` names."""
    keywords = {key: value for key, value in arguments(size).items() if key != "type"}
    with torch.device("meta"):
        backbone = MM_VSSM(**keywords)
        model = mambavision.create_model(keywords["pretrained"])
    own, released = (
        {
            key: value.shape
            for key, value in module.state_dict().items()
            if not key.startswith(("outnorm", "classifier."))
        }
        for module in (backbone, model)
    )
    assert own == released
