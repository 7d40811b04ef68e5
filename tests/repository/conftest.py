"""Small data sets for the programs of all tasks."""

import pytest

from data_sets import write_coco_scenes, write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Real handwritten digits as an ImageNet-style folder."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def coco_scenes(tmp_path_factory):
    """Pictures of digits in COCO's format."""
    return write_coco_scenes(tmp_path_factory.mktemp("scenes") / "coco")
