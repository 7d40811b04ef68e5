"""The tables of models agree with the registry."""

import re

import pytest
import torch
from timm.models import get_pretrained_cfg

import mambavision
from checkout import ROOT
from mambavision.complexity import complexity
from pages import rows

PAGES = {
    "README.md": rows(ROOT / "README.md"),
    "docs/models.md": rows(ROOT / "docs/models.md", "ImageNet classification"),
}


def models(page):
    """Return the cells of the rows of a page's tables that begin with a model and an image size."""
    return {cells[0]: cells[1:] for cells in PAGES[page] if len(cells) > 5 and cells[1].isdigit()}


def test_all_models_are_listed():
    assert set(models("docs/models.md")) == set(mambavision.list_models())
    assert 10 <= len(models("README.md")) == len(models("README.md").keys() & set(mambavision.list_models()))


def test_selection_agrees_with_full_tables():
    full = models("docs/models.md")
    for name, cells in models("README.md").items():
        assert cells[:4] == full[name][:4], name
        assert cells[-2:] == full[name][-2:], name


def test_sizes_and_operations_are_what_is_counted():
    """GMACs, and for VMamba the operations as its authors count them."""
    for name, (size, params, operations, *_) in models("docs/models.md").items():
        with torch.device("meta"):
            model = mambavision.create_model(name)
        assert model.pretrained_cfg["input_size"][-1] == int(size)
        counts = complexity(model, model.pretrained_cfg["input_size"])
        counted = counts.gflops_vmamba if "vmamba" in name else counts.gmacs
        assert (f"{counts.params / 1e6:.1f}", f"{counted:.2f}") == (params, operations), name


@pytest.mark.parametrize("page", PAGES)
def test_weights_are_linked_with_their_license(page):
    """Each to where the code downloads them from, or else to their authors."""
    licenses = {"NVIDIA, non-commercial": "non-commercial", "MIT": "MIT", "the authors' terms": "of the authors"}
    for name, cells in models(page).items():
        config = get_pretrained_cfg(name)
        if cells[-2] == "not released":
            assert not config.has_weights, name
            continue
        link = re.fullmatch(r"\[[^]]+\]\((.+)\)", cells[-2])[1]
        address = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url or config.origin_url
        assert link == address, name
        assert licenses[cells[-1]] in config.license, name
