"""The compiled CPU kernels: a library with a plain C interface beside this file, if it was built.

The library depends on neither Python nor torch, so one file serves every version of both. It holds each kernel three
times: for any processor, for AVX2 and for AVX-512. Work is distributed by torch's own thread pool, `at::parallel_for`,
which the library receives as a function pointer.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_kernels.backends import Implementation
from vision_kernels.views import as_c

LIBRARY = Path(__file__).with_name("_cpu.so")
INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "any processor"}  # best first


class Library(NamedTuple):
    """The kernels for one instruction set."""

    instruction_set: str

    def call(self, kernel: str, *arguments: Tensor | int | None) -> None:
        """Run `kernel` on tensors of float32 or bfloat16 (any strides), integers, and None for an absent tensor.

        Raises:
            MemoryError: There is not enough memory for the kernel's own buffers.
        """
        if _function(kernel, self.instruction_set)(*map(as_c, arguments)):
            raise MemoryError(f"{kernel}: out of memory; compute fewer images at a time or smaller ones")


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Return the library, or why there is none and what to do."""
    if not LIBRARY.exists():
        return "not built: install a C++ compiler (g++ or clang++), then this package again"
    # Part of libtorch's stable C interface since 2.10.
    suffix = "dylib" if sys.platform == "darwin" else "so"
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
    if not hasattr(torch_library, "torch_parallel_for"):
        return f"torch {torch.__version__} is too old for it: install torch 2.10 or newer"
    library = ctypes.CDLL(str(LIBRARY))
    library.vision_kernels_use_thread_pool(torch_library.torch_parallel_for)
    return library


@functools.cache
def _function(kernel: str, instruction_set: str) -> Callable[..., Any]:
    function = getattr(_load(), f"{kernel}_{instruction_set}")
    function.restype = ctypes.c_int64
    return function


@functools.cache
def why_unavailable(instruction_set: str) -> str | None:
    """Return why kernels for `instruction_set` cannot run here and what to do, or None if they can."""
    library = _load()
    if isinstance(library, str):
        return library
    if instruction_set != "baseline" and not getattr(library, f"vision_kernels_has_{instruction_set}")():
        return f"this processor has no {INSTRUCTION_SETS[instruction_set]}"
    return None


def why_not_float32(given: tuple) -> str | None:
    """Return why kernels that compute in float32 cannot take the arguments of an operator, or None if they can."""
    for each in given:
        if isinstance(each, Tensor) and each.dtype == torch.float64:
            return "computes in float32, and an input is float64"
    return None


def compiled_for_cpu(forward: Callable, backward: Callable | None, why_unable: Callable) -> tuple[Implementation, ...]:
    """Return one implementation for each instruction set; `forward` and `backward` take the `Library` first."""
    return tuple(
        Implementation(
            name,
            functools.partial(forward, Library(name)),
            functools.partial(backward, Library(name)) if backward else None,
            f"C++ for {processors}",
            devices=("cpu",),
            why_unavailable=functools.partial(why_unavailable, name),
            why_unable=why_unable,
        )
        for name, processors in INSTRUCTION_SETS.items()
    )
