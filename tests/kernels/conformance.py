"""What the conformance tests of all operators share."""

import torch

from vision_kernels.backends import Operator
from vision_kernels.native import INSTRUCTION_SETS


def backends(operator: Operator, float64: bool = False) -> list[str]:
    """Names of the operator's backends that can run here on the CPU; those that compute in float64, if asked."""
    return [
        each.backend
        for each in operator.implementations
        if each.runs_on("cpu") and each.why_unavailable() is None and not (float64 and each.backend in INSTRUCTION_SETS)
    ]


def relative_rms(found, expected):
    """Root mean square of the difference over that of the expected values."""
    scale = expected.double().pow(2).mean().sqrt().clamp(min=1e-12)
    return ((found.double() - expected.double()).pow(2).mean().sqrt() / scale).item() if expected.numel() else 0.0


def poison_unwritten_memory(monkeypatch):
    """Fill new tensors with NaN, so that reading what was never written shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan
