"""Files that the programs of VMamba's authors wrote, in all their layouts."""

import re
import sys
import types

import pytest
import torch

import mambavision
from mambavision.checkpoint import load_pretrained, read_checkpoint
from mambavision.errors import CheckpointError
from small_models import SMALL

NAMES = ["vmamba_tiny_s1l8", "vanilla_vmamba_tiny"]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def source(name):
    return small(name)


def small(name, **kwargs):
    return mambavision.create_model(name, **SMALL[name] | kwargs)


def renamed(weights, **replacements):
    """Replace parts of keys; a dot in the name of a keyword is written as two underscores."""
    for old, new in replacements.items():
        weights = {key.replace(old.replace("__", "."), new): value for key, value in weights.items()}
    return weights


def in_one_file(weights):
    """Layout of the edition in one file: flat projections; merging has places instead of names."""
    flat = {key: value.flatten(0, 1) if key.endswith("_weight") else value for key, value in weights.items()}
    flat = renamed(flat, x_proj_weight="x_proj.weight", dt_projs_weight="dt_projs.weight")
    return renamed(flat, downsample__norm="downsample.1", downsample__reduction="downsample.2")


def earlier(weights):
    """Names of the first releases."""
    weights = renamed(weights, patch_embed__0="patch_embed.proj", patch_embed__2="patch_embed.norm")
    weights = renamed(weights, classifier__norm="norm", classifier__head="head", __op__=".self_attention.")
    return {re.sub(r"(blocks\.\d+)\.norm\.", r"\1.ln_1.", key): value for key, value in weights.items()}


def as_convolutions(weights):
    """1x1 convolutions in the place of the linear layers of a map."""
    linear = re.compile(r"(in_proj|out_proj|fc1|fc2|reduction)\.weight$")
    return {key: value[..., None, None] if linear.search(key) else value for key, value in weights.items()}


LAYOUTS = {
    "of the repository": dict,
    "in one file": in_one_file,
    "earlier names": earlier,
    "1x1 convolutions": as_convolutions,
    "module. prefix": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "backbone. prefix": lambda weights: {f"backbone.{key}": value for key, value in weights.items()},
    "all at once": lambda weights: {
        f"module.backbone.{key}": value for key, value in earlier(in_one_file(as_convolutions(weights))).items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_strictly(name, source, layout, tmp_path):
    weights = LAYOUTS[layout](source.state_dict())
    shapes = [{key: value.shape for key, value in each.items()} for each in (weights, source.state_dict())]
    assert (shapes[0] == shapes[1]) == (layout == "of the repository")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "ckpt.pth")
    model = small(name)
    report = mambavision.load_checkpoint(model, tmp_path / "ckpt.pth")
    assert report.loaded == len(source.state_dict())
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_positions_are_resized(tmp_path):
    source = small(NAMES[0], pos_embed_size=(64, 64))
    mambavision.save_checkpoint({"model": source.state_dict()}, tmp_path / "ckpt.pth")
    model = small(NAMES[0], pos_embed_size=(32, 96))
    mambavision.load_checkpoint(model, tmp_path / "ckpt.pth")
    expected = torch.nn.functional.interpolate(source.pos_embed, (8, 24), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed.data, expected)


# The settings beside the weights


class CfgNode(dict):
    """As yacs makes it: a dictionary with attributes of its own, some of them sets and dictionaries."""

    def __init__(self, entries):
        super().__init__({key: CfgNode(value) if isinstance(value, dict) else value for key, value in entries.items()})
        self.__dict__["__immutable__"] = False
        self.__dict__["__deprecated_keys__"] = set()
        self.__dict__["__renamed_keys__"] = {}
        self.__dict__["__new_allowed__"] = False


@pytest.fixture
def save_as_of(tmp_path, monkeypatch):
    """Save content with objects of `CfgNode` as if that were of another package; afterwards there is none."""

    def save(content, module):
        package = module.split(".")[0]
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(CfgNode=CfgNode))
        monkeypatch.setattr(CfgNode, "__module__", module)
        torch.save(content, tmp_path / "ckpt_epoch_264.pth")
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
        return tmp_path / "ckpt_epoch_264.pth"

    return save


@pytest.fixture
def released(source, save_as_of):
    """A file as the original's training program writes it; there is no yacs to read it with, as for most users."""
    content = {
        "model": source.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
        "lr_scheduler": {"t_initial": 350_000, "base_values": [1e-3]},
        "max_accuracy": 82.6,
        "scaler": {"scale": 65536.0},
        "epoch": 264,
        "config": CfgNode(
            {
                "BASE": [""],
                "MODEL": {"VSSM": {"DEPTHS": [2, 2, 8, 2], "EMBED_DIM": 96}},
                "OPTIMIZER": {"BETAS": (0.9, 1)},
            }
        ),
        "model_ema": {key: value + 1 for key, value in source.state_dict().items()},
        "max_accuray_ema": 82.5,
    }
    return save_as_of(content, "yacs.config")


def test_released_files_load_without_yacs(name, source, released):
    settings = read_checkpoint(released)["config"]
    assert settings["MODEL"]["VSSM"]["DEPTHS"] == [2, 2, 8, 2]
    assert settings["OPTIMIZER"]["BETAS"] == (0.9, 1)
    model = small(name)
    mambavision.load_checkpoint(model, released)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    mambavision.load_checkpoint(model, released, ema=True)
    torch.testing.assert_close(model.classifier.head.bias, source.classifier.head.bias + 1)


# Files of other tasks


@pytest.mark.parametrize("parts", [["neck", "rpn_head", "roi_head"], ["decode_head", "auxiliary_head"]], ids=" ".join)
def test_detectors_and_segmentors_are_told_from_classifiers(name, source, tmp_path, parts):
    backbone = {key: value for key, value in source.state_dict().items() if not key.startswith("classifier")}
    weights = {f"backbone.{key}": value for key, value in backbone.items()}
    weights |= {f"backbone.outnorm{level}.weight": torch.ones(1) for level in range(4)}
    weights |= {f"{part}.conv.weight": torch.ones(1) for part in parts}
    mambavision.save_checkpoint({"meta": {}, "state_dict": weights}, tmp_path / "mask_rcnn.pth")
    model = small(name)
    message = rf"rcnn\.pth: belongs to a detector or segmentor \({', '.join(parts)} beside its backbone\).*strict=False"
    for load in (mambavision.load_checkpoint, load_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(model, tmp_path / "mask_rcnn.pth")
    assert mambavision.load_checkpoint(model, tmp_path / "mask_rcnn.pth", strict=False).loaded == len(backbone)


def test_unreadable_settings_are_named(save_as_of):
    path = save_as_of({"meta": CfgNode({"epoch": 12})}, "mmengine.logs")
    with pytest.raises(CheckpointError, match=r"to a detector or segmentor, .* refused, .*\(mmengine\.logs\.CfgNode\)"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"holds objects of mmengine\.logs, which is not installed; install it"):
        read_checkpoint(path, trust=True)
