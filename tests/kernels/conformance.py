"""Helpers for the conformance tests of all operators."""

import dataclasses

import torch

import emulation
from vision_kernels.backends import BACKEND_VARIABLE, OPERATORS, Operator

COMPUTING_FLOAT64 = ("torch", "reference")  # the other backends refuse it
_ON_GPU = "@cuda"

for _operator in OPERATORS.values():
    emulation.add_emulated(_operator)


def backends(operator: Operator, float64: bool = False) -> list[str]:
    """Return the operator's backends that can run here, or only those that compute in float64.

    Those on the CPU, except for those that run only if they are named; names of those for GPUs end with "@cuda".
    """
    able = [each for each in operator.implementations if each.why_unavailable() is None]
    if float64:
        able = [each for each in able if each.backend in COMPUTING_FLOAT64]
    names = [each.backend for each in able if each.runs_on("cpu") and not each.only_if_named]
    if torch.cuda.is_available():
        names += [each.backend + _ON_GPU for each in able if "cuda" in each.devices and not each.only_if_named]
    return names


def force(choice: str, monkeypatch, *operators: Operator) -> str:
    """Force one of `backends`, which may move tensors from the CPU to a GPU and back; return its name."""
    name = choice.removesuffix(_ON_GPU)
    monkeypatch.setenv(BACKEND_VARIABLE, ",".join(f"{operator.name}={name}" for operator in operators))
    if name != choice:
        select = Operator.select

        def select_on_gpu(self, device_type, *arguments):
            chosen = select(self, "cuda", *arguments)
            backward = chosen.backward and _on_gpu(chosen.backward)
            return dataclasses.replace(chosen, forward=_on_gpu(chosen.forward), backward=backward)

        monkeypatch.setattr(Operator, "select", select_on_gpu)
    return name


def _on_gpu(function):
    def computed_there(*arguments):
        results = function(*map(_moved, arguments))
        if isinstance(results, torch.Tensor):
            return results.cpu()
        return tuple(None if each is None else each.cpu() for each in results)

    return computed_there


def _moved(argument):
    """Move tensors, also those in a named tuple, with their strides: `.cuda()` does not preserve those of a slice."""
    if isinstance(argument, tuple):
        return type(argument)(*map(_moved, argument))
    if not isinstance(argument, torch.Tensor):
        return argument
    storage = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage()).cuda()
    return storage.as_strided(argument.shape, argument.stride(), argument.storage_offset())


def relative_rms(found, expected):
    """Return the root mean square of the difference, relative to that of the expected values."""
    scale = expected.double().pow(2).mean().sqrt().clamp(min=1e-12)
    return ((found.double() - expected.double()).pow(2).mean().sqrt() / scale).item() if expected.numel() else 0.0


def poison_unwritten_memory(monkeypatch):
    """Fill new tensors with NaN, to detect reads of unwritten memory."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan
