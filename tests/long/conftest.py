"""A small data set to train on."""

import pytest

from data_sets import write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Real handwritten digits as an ImageNet-style folder."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")
