"""Losses and gradients that are not finite."""

import math

import pytest
import torch

from mambavision.errors import NonFiniteError
from mambavision.running.finite import FiniteGuard
from mambavision.running.group import Group


@pytest.fixture
def guard():
    return FiniteGuard(Group())


def test_finite_steps_pass(guard):
    for also in (False, True):
        guard.note(torch.tensor(1.0), lambda: ["a"])
        assert guard.check([torch.ones(3), torch.full((2,), 1e38)], also) == also
    assert guard.check([]) is False


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_of_a_bad_loss_are_named(guard, value):
    guard.note(torch.tensor(1.0), lambda: ["good"])
    guard.note(torch.tensor(value), lambda: ["bad.png", "worse.png"])
    with pytest.raises(NonFiniteError, match=r"the loss is not finite.*Samples: process 0: bad.png, worse.png\."):
        guard.check([torch.ones(3)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_of_a_bad_gradient_are_named(guard, value):
    guard.note(torch.tensor(1.0), lambda: [f"{number}.png" for number in range(9)])
    with pytest.raises(NonFiniteError, match=r"the gradient is not finite.*0\.png, 1\.png.*7\.png, \.\.\.\."):
        guard.check([torch.ones(3), torch.tensor([1.0, value])])


def test_past_steps_are_forgotten(guard):
    guard.note(torch.tensor(1.0), lambda: ["past"])
    guard.check([])
    guard.note(torch.tensor(1.0), lambda: ["present"])
    with pytest.raises(NonFiniteError, match="process 0: present"):
        guard.check([torch.tensor(math.nan)])


def test_skipped_steps_have_a_limit(guard):
    for _ in range(24):
        guard.count_skip(True)
    guard.count_skip(False)
    for _ in range(24):
        guard.count_skip(True)
    with pytest.raises(NonFiniteError, match="25 steps in a row"):
        guard.count_skip(True)


def test_a_loss_scale_looks_after_overflow_of_loss_and_gradient(guard):
    """GradScaler skips such a step, as it does one whose gradient alone overflows."""
    guard.note(torch.tensor(math.nan), lambda: ["a.png"])
    assert guard.check([torch.tensor(math.inf)], also=True, has_loss_scale=True)
    guard.note(torch.tensor(1.0), lambda: ["b.png"])
    assert not guard.check([], has_loss_scale=False)  # the batch before is forgotten
