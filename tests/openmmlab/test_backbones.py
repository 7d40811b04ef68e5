"""The backbones that OpenMMLab configs name: recorded numbers, arguments, weights."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

import mambavision
from mambavision.errors import CheckpointError, UserError
from mambavision.openmmlab import MM_VSSM, MM_mamba_vision, RegisteredBackbone
from mambavision.openmmlab.backbones.features import BackboneArgumentError
from parity import fill_, image, recorded
from small_models import SMALL

SIZE = {key: value for key, value in SMALL["mamba_vision_T"].items() if key != "num_classes"}
SMALL_BACKBONES = {
    "MM_mamba_vision": partial(MM_mamba_vision, **SIZE),
    "RegisteredBackbone": partial(RegisteredBackbone, "mamba_vision_T", **SIZE),
    "MM_VSSM": partial(MM_VSSM, dims=16, depths=(1, 1, 2, 1), norm_layer="bn"),
}


@pytest.fixture(scope="module", params=["det_T", "seg_T"])
def recorded_backbone(request):
    manifest, arrays = recorded(f"mambavision/{request.param}")
    return fill_(MM_mamba_vision(**manifest["config"])).eval(), manifest, arrays


def test_entries_are_the_originals(recorded_backbone):
    backbone, manifest, _ = recorded_backbone
    entries = [[key, list(value.shape), str(value.dtype)[6:]] for key, value in backbone.state_dict().items()]
    assert entries == manifest["entries"]
    assert [name for name, _ in backbone.named_buffers()] == manifest["buffers"]


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width", "seed"), [(256, 320, 5), (250, 333, 6)])
def test_features_are_the_originals(recorded_backbone, height, width, seed):
    backbone, manifest, arrays = recorded_backbone
    maps = backbone(image(1, height, width, seed))
    expected = manifest["levels"][f"{height}x{width}_seed{seed}"]
    assert isinstance(maps, list)
    assert len(maps) == len(expected) == 4
    for index, (features, level) in enumerate(zip(maps, expected, strict=True)):
        assert list(features.shape) == level["shape"]
        assert features.is_contiguous()
        assert features.mean().item() == pytest.approx(level["mean"], abs=1e-6)
        assert features.std().item() == pytest.approx(level["std"], abs=1e-6)
        first = arrays[f"level{index}_first64_{height}x{width}_seed{seed}"]
        np.testing.assert_allclose(features.flatten()[:64], first, rtol=0, atol=5e-5)


@pytest.mark.parametrize("library", ["mmdet", "mmseg", "mmpretrain"])
def test_every_library_finds_the_backbones(library):
    with DefaultScope.overwrite_default_scope(library):
        init_default_scope(library)
        built = MODELS.build({"type": "MM_mamba_vision", **SIZE})
        assert isinstance(MODELS.build({"type": "MM_VSSM", "dims": 16}), MM_VSSM)
        named = MODELS.build({"type": "RegisteredBackbone", "name": "mamba_vision_T", **SIZE})
    x = torch.randn(1, 3, 64, 64)
    assert [features.shape for features in built.eval()(x)] == [features.shape for features in named.eval()(x)]


def test_argument_that_does_not_exist_is_refused():
    for inherited in ({}, {"depth": 50}, {"embed_dims": 96}):
        with pytest.raises(BackboneArgumentError, match=r"no argument 'drop_pth_rate'\. Did you mean 'drop_path_rate'"):
            MM_mamba_vision(**SIZE, drop_pth_rate=0.1, **inherited)


@pytest.mark.parametrize(
    "argument",
    [
        {"out_indices": (0, 4)},
        {"out_indices": (3, 1)},
        {"out_indices": (1, 1)},
        {"out_indices": 3},
        {"frozen_stages": 5},
        {"norm_layer": "gn"},
        {"init_cfg": {"type": "Normal"}},
    ],
)
def test_value_that_does_not_exist_is_refused(argument):
    with pytest.raises(BackboneArgumentError, match=next(iter(argument))):
        MM_mamba_vision(**SIZE, **argument)


@pytest.mark.parametrize(
    "inherited",
    [
        {"depth": 50, "num_stages": 4, "frozen_stages": 1, "norm_cfg": {"type": "BN"}, "norm_eval": True,
         "style": "pytorch", "init_cfg": {"type": "Pretrained", "checkpoint": "torchvision://resnet50"}},
        {"embed_dims": 96, "patch_size": 4, "qkv_bias": True, "use_abs_pos_embed": False, "act_cfg": {"type": "GELU"}},
    ],
    ids=["ResNet", "Swin"],
)  # fmt: skip
def test_config_of_the_original_is_understood_as_it_does(inherited, caplog):
    """Its configs inherit another backbone's arguments, and its wrapper ignores them and `drop_path_rate`."""
    with caplog.at_level(logging.WARNING):
        backbone = MM_mamba_vision(**SIZE, drop_path_rate=0.7, **inherited).train()
    assert all(name in caplog.text for name in inherited)
    assert "drop_path_rate=0.7" in caplog.text
    assert backbone.levels[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(module.training for module in backbone.modules())
    assert backbone.pretrained is None


def test_stochastic_depth_is_taken_from_the_config():
    backbone = MM_mamba_vision(**SIZE, drop_path_rate=0.7)
    assert backbone.levels[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.7)


@pytest.mark.parametrize("stages", [-1, 0, 2, 3, 4])
@pytest.mark.parametrize("kind", SMALL_BACKBONES)
def test_frozen_stages(kind, stages):
    backbone = SMALL_BACKBONES[kind](frozen_stages=stages, drop_path_rate=0.5).train()
    parts = [backbone.trunk.patch_embed, *backbone.trunk.stages]
    norms = [getattr(backbone, f"outnorm{stage}") for stage in range(4)]
    for index, part in enumerate(parts):
        is_frozen = index <= stages
        assert all(parameter.requires_grad != is_frozen for parameter in part.parameters())
        assert all(module.training != is_frozen for module in part.modules() if list(module.parameters()))
    assert [not norm.weight.requires_grad for norm in norms] == [stage < stages for stage in range(4)]
    statistics = [part.state_dict() for part in parts]
    before = [{key: value.clone() for key, value in entries.items()} for entries in statistics]
    features = sum(features.sum() for features in backbone(torch.randn(2, 3, 64, 64)))
    if stages < 4:
        features.backward()
    assert features.requires_grad == (stages < 4)
    for index in range(stages + 1):
        assert all(torch.equal(before[index][key], statistics[index][key]) for key in before[index])


@pytest.mark.parametrize("kind", SMALL_BACKBONES)
def test_batch_norms_can_keep_their_statistics(kind):
    backbone = SMALL_BACKBONES[kind](norm_eval=True).train()
    is_norm = [isinstance(module, nn.BatchNorm2d) for module in backbone.trunk.modules()]
    assert [not module.training for module in backbone.trunk.modules()] == is_norm
    assert any(is_norm)


@pytest.mark.parametrize("kind", SMALL_BACKBONES)
def test_recomputed_activations_give_the_same_gradients(kind):
    plain, recomputing = (SMALL_BACKBONES[kind](drop_path_rate=0.0, with_cp=with_cp) for with_cp in (False, True))
    recomputing.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    saved = []
    for backbone in (plain, recomputing):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, tensors=tensors: tensors.append(t) or t, lambda t: t):
            loss = sum(features.square().mean() for features in backbone.train()(x))
        loss.backward()
        saved.append(len(tensors))
    assert saved[1] < saved[0]
    for one, other in zip(plain.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(plain.buffers(), recomputing.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_chosen_stages_and_norms():
    backbone = MM_mamba_vision(**SIZE, out_indices=(1, 3), norm_layer="bn").eval()
    assert isinstance(backbone.outnorm1, nn.BatchNorm2d)
    assert not hasattr(backbone, "outnorm0")
    assert [features.shape[1] for features in backbone(torch.randn(1, 3, 64, 64))] == [32, 128]


def test_any_registered_model_is_a_backbone():
    backbone = RegisteredBackbone("resnet18", out_indices=(1, 2, 3, 4), frozen_stages=1, norm_eval=True).eval()
    assert [features.shape[1:] for features in backbone(torch.randn(1, 3, 64, 64))] == [
        (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)
    ]  # fmt: skip
    with pytest.raises(UserError, match="Did you mean 'mamba_vision_T'"):
        RegisteredBackbone("mamba_vison_T")


@pytest.fixture
def classifier(tmp_path):
    """A trained classifier's file and its weights."""
    model = fill_(mambavision.create_model("mamba_vision_T", **SMALL["mamba_vision_T"]))
    mambavision.save_checkpoint({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "classifier.pth.tar")
    return str(tmp_path / "classifier.pth.tar"), model.state_dict()


@pytest.mark.parametrize("form", ["pretrained", "init_cfg", "named", "safetensors"])
def test_weights_of_a_classifier_are_taken(classifier, form, tmp_path):
    path, weights = classifier
    if form == "safetensors":
        path = str(tmp_path / "classifier.safetensors")
        mambavision.save_checkpoint(weights, path)
    if form == "named":
        backbone = RegisteredBackbone("mamba_vision_T", pretrained=path, **SIZE)
    elif form == "init_cfg":
        backbone = MM_mamba_vision(**SIZE, init_cfg={"type": "Pretrained", "checkpoint": path})
    else:
        backbone = MM_mamba_vision(**SIZE, pretrained=path)
    backbone.init_weights()
    own = backbone.trunk.state_dict()
    taken = [key for key in weights if not key.startswith(("norm.", "head."))]
    assert len(taken) > 50
    assert all(torch.equal(own[key], weights[key]) for key in taken)
    assert all(key in taken or key.startswith("outnorm") for key in own)


def test_released_weights_are_taken_by_name(monkeypatch):
    released = fill_(mambavision.create_model("mamba_vision_T", **SIZE))
    calls = []
    monkeypatch.setattr(
        "mambavision.openmmlab.backbones.features.create_model",
        lambda *args, **kwargs: calls.append((args, kwargs)) or released,
    )
    backbone = MM_mamba_vision(**SIZE, pretrained="mamba_vision_T")
    assert not calls  # only training needs them
    backbone.init_weights()
    assert calls == [(("mamba_vision_T",), {"pretrained": True})]
    assert torch.equal(backbone.levels[3].blocks[0].norm1.weight, released.levels[3].blocks[0].norm1.weight)


def test_weights_of_another_model_are_refused(classifier):
    path, _ = classifier
    with pytest.raises(CheckpointError, match=r"pth.tar: belongs to another model than the backbone: .*missing"):
        MM_mamba_vision(**{**SIZE, "depths": (1, 1, 2, 4)}, pretrained=path).init_weights()
    with pytest.raises(CheckpointError, match=r"of another shape"):
        MM_mamba_vision(**{**SIZE, "dim": 32}, pretrained=path).init_weights()
