"""Steps of OpenMMLab's optimizers, which are taken only if loss and gradients are finite."""

import math
from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict

from mambavision.errors import NonFiniteError, UserError
from mambavision.openmmlab.training.guarded_steps import GuardedSteps
from mambavision.running.finite import FiniteGuard
from mambavision.running.group import Group
from mambavision.running.signals import StopSignals


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.ones(2))


@pytest.fixture
def signals():
    return StopSignals()


@pytest.fixture
def guarded(signals):
    def guard(wrapper):
        steps = GuardedSteps(wrapper, FiniteGuard(Group()), signals, lambda: "Look")
        steps.batch = {"data_samples": [SimpleNamespace(img_path="a.png"), SimpleNamespace()]}
        return steps

    return guard


@pytest.fixture
def scaled(weight, monkeypatch):
    """A wrapper with a loss scale, on the CPU."""
    monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", lambda: True)
    wrapper = AmpOptimWrapper(optimizer=torch.optim.SGD([weight], 0.5))
    wrapper.loss_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    return wrapper


def test_finite_steps_are_taken(guarded, signals, weight):
    wrapper = OptimWrapper(torch.optim.SGD([weight], 0.5), accumulative_counts=2)
    steps = guarded(wrapper)
    wrapper.update_params(weight.sum())
    signals.received = True
    assert weight.tolist() == [1, 1]
    assert not steps.must_stop  # in the middle of a step
    wrapper.update_params(weight.sum())
    assert weight.tolist() == [0.5, 0.5]
    assert steps.must_stop


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_others_are_not(guarded, weight, what):
    wrapper = OptimWrapper(torch.optim.SGD([weight], 0.5), clip_grad={"max_norm": 1.0})
    guarded(wrapper)
    loss = weight.sum() * math.nan if what == "loss" else (weight - 1).abs().sqrt().sum()
    with pytest.raises(NonFiniteError, match=rf"the {what} is not .* process 0: a\.png, an image without img_path\."):
        wrapper.update_params(loss)
    assert weight.tolist() == [1, 1]


def test_skipped_steps_have_a_limit(guarded, scaled, weight):
    guarded(scaled)
    scaled.update_params((weight.sum() * 1e30).log())  # overflows once scaled, which is normal
    weight.register_hook(lambda gradient: gradient * math.inf)
    for _ in range(24):
        scaled.update_params(weight.sum())
    with pytest.raises(NonFiniteError, match="overflowed in 25 steps in a row"):
        scaled.update_params(weight.sum())
    assert weight.isfinite().all()


def test_losses_that_are_not_finite_are_skipped_by_the_loss_scale(guarded, scaled, weight):
    guarded(scaled)
    for _ in range(24):
        scaled.update_params(weight.sum() * math.nan)
    assert weight.tolist() == [1, 1]
    with pytest.raises(NonFiniteError, match="overflowed in 25 steps in a row"):
        scaled.update_params(weight.sum() * math.nan)


def test_several_optimizers(guarded, weight):
    wrapper = OptimWrapperDict(one=OptimWrapper(torch.optim.SGD([weight], 0.5)))
    with pytest.raises(UserError, match="OptimWrapperDict has several optimizers"):
        guarded(wrapper)
