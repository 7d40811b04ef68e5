"""Kernels in Triton: where they can run, and how an operator offers them.

Triton is optional, and takes a moment to import: modules with kernels are imported at their first call. With
``TRITON_INTERPRET=1`` it runs kernels in Python on the CPU, to test them without a GPU; as that is slow, they then run
only where ``VISION_KERNELS_BACKEND`` asks for them.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from vision_kernels.backends import Implementation
from vision_kernels.native import why_not_float32

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LEAST_CAPABILITY = (7, 0)  # of the GPUs that Triton compiles for


def compiled_by_triton(
    module: str, forward: str, backward: str | None, why_unable: Callable = why_not_float32
) -> Implementation:
    """Return the implementation whose functions of these names are found in a module that imports Triton."""
    return Implementation(
        "triton",
        _at_first_call(module, forward),
        backward and _at_first_call(module, backward),
        "Triton, interpreted in Python for tests" if _INTERPRETED else "Triton, compiled at first use",
        devices=("cuda", "cpu") if _INTERPRETED else ("cuda",),
        why_unavailable=why_unavailable,
        why_unable=why_unable,
        only_if_named=_INTERPRETED,
    )


def why_not_of_16_or_32_bits(*arguments: Any) -> str | None:
    """Return why kernels for floating-point types up to float32 cannot take tensors or types, or None if they can."""
    for each in arguments:
        dtype = each.dtype if isinstance(each, torch.Tensor) else each
        if isinstance(dtype, torch.dtype) and dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"handles float32, bfloat16 and float16, not {dtype}"
    return None


def _at_first_call(module: str, name: str) -> Callable:
    def call(*arguments: Any) -> Any:
        if _INTERPRETED:
            _let_interpreter_count()
        return getattr(importlib.import_module(module), name)(*arguments)

    return call


@functools.cache
def _let_interpreter_count() -> None:
    """Let loops of interpreted kernels have bounds that are computed: Triton 3.6 takes them for arrays of numpy 2.4."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


@functools.cache
def why_unavailable() -> str | None:
    """Return why kernels in Triton cannot run on this machine and what to do, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (for Linux)"
    if _INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use; TRITON_INTERPRET=1 runs it in Python, slowly"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        needed = ".".join(map(str, _LEAST_CAPABILITY))
        return f"the GPU has compute capability {'.'.join(map(str, capability))}: needs {needed} or newer"
    return None
