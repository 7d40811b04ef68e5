"""Kernels in Triton: where they can run, and the implementations that launch them.

Triton is optional and slow to import, so modules with kernels are imported at their first call. With
``TRITON_INTERPRET=1`` it runs kernels in Python on the CPU, to test them without a GPU; because that is slow, they then
run only if ``VISION_KERNELS_BACKEND`` names them.
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
_LEAST_CAPABILITY = (7, 0)  # of GPUs that Triton supports


def compiled_by_triton(
    module: str, forward: str = "forward", backward: str | None = "backward", why_unable: Callable = why_not_float32
) -> Implementation:
    """Return the implementation by the functions with these names in a module that imports Triton."""
    return Implementation(
        "triton",
        _at_first_call(module, forward),
        _at_first_call(module, backward) if backward else None,
        "Triton, interpreted in Python for tests" if _INTERPRETED else "Triton, compiled at first use",
        devices=("cuda", "cpu") if _INTERPRETED else ("cuda",),
        why_unavailable=why_unavailable,
        why_unable=why_unable,
        only_if_named=_INTERPRETED,
    )


def _at_first_call(module: str, name: str) -> Callable:
    def call(*arguments: Any) -> Any:
        if _INTERPRETED:
            _make_interpreted_bounds_indices()
        return getattr(importlib.import_module(module), name)(*arguments)

    return call


@functools.cache
def _make_interpreted_bounds_indices() -> None:
    """Make computed loop bounds work in interpreted kernels: Triton 3.6 uses them as indices, numpy 2.4 refuses."""
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
