"""Scenes to detect digits in, and a small detector."""

import pytest

from checkout import ROOT
from data_sets import write_coco_scenes


@pytest.fixture(scope="session")
def coco_scenes(tmp_path_factory):
    """Four pictures of digits to train on and two held out, in COCO's format."""
    return write_coco_scenes(tmp_path_factory.mktemp("scenes") / "coco")


@pytest.fixture
def detector_config(coco_scenes, monkeypatch):
    """The config of a small Mask R-CNN on `coco_scenes`."""
    monkeypatch.setenv("SCENES_ROOT", str(coco_scenes))
    return ROOT / "tests" / "openmmlab" / "small_detector.py"
