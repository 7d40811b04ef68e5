"""Invalid arguments, which operators must refuse however they are called, and sizes of zero."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import SIZES, registered, sample, schema

import conformance
from vision_kernels.backends import BACKEND_VARIABLE, OPERATORS

_PROGRAM = Path(__file__).with_name("hostile_calls.py")
_EXPORTED = [name for name in registered() if not name.endswith("_backward")]


def test_every_registered_operator_has_a_sample():
    assert set(_EXPORTED) == set(SIZES) == set(OPERATORS)


def test_hostile_arguments_are_refused_without_a_crash():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    names = registered()
    run = subprocess.run([sys.executable, _PROGRAM, *names], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, f"{run.stdout[-200:]} {run.stderr[-2000:]}"
    assert [line.split(":")[0] for line in run.stdout.splitlines() if line.endswith("calls survived")] == names


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.complex64, torch.float8_e4m3fn, torch.quint8])
@pytest.mark.parametrize("name", [each for each in _EXPORTED if schema(each).arguments[-1].name == "out_dtype"])
def test_outputs_are_real_floating_point(name, dtype):
    *arguments, _ = sample(name)
    with pytest.raises(ValueError, match=f"{name}: out_dtype must be a real floating-point type, got {dtype}"):
        getattr(torch.ops.vision_kernels, name)(*arguments, dtype)


def test_freed_memory_is_not_read():
    x, weight = sample("conv1d_silu")
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its storage was freed"):
        torch.ops.vision_kernels.conv1d_silu(x, weight)


def _results(name, **sizes):
    """Return the results and gradients of an operator by the forced backend, or the error if sizes are refused."""
    arguments = sample(name, **sizes)
    tensors = [each.requires_grad_() for each in arguments if isinstance(each, torch.Tensor)]
    if name == "mamba_mixer":  # only the public function has gradients
        import vision_kernels

        operator = vision_kernels.mamba_mixer
    else:
        operator = getattr(torch.ops.vision_kernels, name)
    try:
        y = operator(*arguments)
    except ValueError as error:
        return str(error)
    return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]


_ZEROS = [
    (name, zeros) for name, sizes in SIZES.items() for count in (1, 2) for zeros in itertools.combinations(sizes, count)
]


@pytest.mark.parametrize(("name", "zeros"), _ZEROS, ids=["-".join((name, *zeros)) for name, zeros in _ZEROS])
def test_all_backends_agree_on_sizes_of_zero(name, zeros, monkeypatch):
    sizes = dict.fromkeys(zeros, 0)
    # Only this operator is forced, except for a composition, whose parts have backends of their own.
    backends = conformance.backends(OPERATORS[name])
    if name == "mamba_mixer":
        backends, variable = conformance.backends(OPERATORS["selective_scan"]), "{}"
    else:
        variable = f"{name}={{}}"
    expected = None
    for backend in reversed(backends):
        monkeypatch.setenv(BACKEND_VARIABLE, variable.format(backend.removesuffix("@cuda")))
        found = _results(name, **sizes)
        if expected is None:
            expected = found
        if isinstance(expected, str):
            assert found == expected, backend
            continue
        assert not isinstance(found, str), f"{backend}: {found}, not in the reference"
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, msg=lambda text, backend=backend: f"{backend}: {text}")
    if not isinstance(expected, str) and expected[0].numel() == 0:
        assert all(not each.any() for each in expected[1:])
