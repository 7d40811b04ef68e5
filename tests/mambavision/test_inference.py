"""Faster models that compute the same."""

import pytest
import torch
from torch import nn

import mambavision


def test_folded_batch_norm_changes_nothing_but_rounding(small_model):
    for module in small_model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    image = torch.randn(2, 3, 64, 64)
    folded = mambavision.fold_batch_norm(small_model)
    with torch.inference_mode():
        torch.testing.assert_close(folded(image), small_model(image), rtol=1e-4, atol=1e-4)

    def count(model):
        return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())

    assert count(small_model) > count(folded) or not count(small_model)
    with torch.inference_mode():
        torch.testing.assert_close(folded.double()(image.double()), small_model.double()(image.double()))


def test_folding_needs_evaluation_mode(small_model):
    with pytest.raises(ValueError, match="evaluation mode"):
        mambavision.fold_batch_norm(small_model.train())
