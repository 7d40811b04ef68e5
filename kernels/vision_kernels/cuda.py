"""The compiled CUDA kernels: a library with a plain C interface beside this file, if it was built."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_kernels.backends import Implementation
from vision_kernels.views import as_c


class Library:
    """Kernels that take a CUDA stream, then tensors and integers, and return an error message or nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @functools.cached_property
    def _functions(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(self.path))

    @functools.cache  # noqa: B019 - there is one library, or two under test
    def _function(self, kernel: str) -> Callable[..., Any]:
        function = getattr(self._functions, kernel)
        function.restype = ctypes.c_char_p
        return function

    def call(self, kernel: str, *arguments: Tensor | int | None) -> None:
        """Run `kernel` on tensors of float32, float16 or bfloat16 (any strides), integers, and None for no tensor.

        Raises:
            RuntimeError: The kernel could not be launched.
        """
        device = next(each.device for each in arguments if isinstance(each, Tensor))
        if device.type != "cuda":
            return self._run(kernel, None, arguments)
        with torch.cuda.device(device):
            return self._run(kernel, torch.cuda.current_stream().cuda_stream, arguments)

    def _run(self, kernel: str, stream: int | None, arguments: tuple) -> None:
        error = self._function(kernel)(ctypes.c_void_p(stream), *map(as_c, arguments))
        if error is not None:
            raise RuntimeError(f"{kernel}: {error.decode()}")


LIBRARY = Library(Path(__file__).with_name("_cuda.so"))


@functools.cache
def why_unavailable() -> str | None:
    """Return why the kernels cannot run here and what to do, or None if they can."""
    if not LIBRARY.path.exists():
        return "not built: install the CUDA toolkit, then this package again with VISION_KERNELS_CUDA=1"
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        LIBRARY.call("vision_kernels_probe", torch.empty(0, device="cuda"))
    except RuntimeError as error:
        return f"built for other GPUs ({error}): set TORCH_CUDA_ARCH_LIST to this one's and install again"
    return None


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that a block may use on a GPU; on a CPU, which emulates the kernels, that of an H200."""
    if device.type != "cuda":
        return 227 << 10
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 << 10)  # older torch


def compiled_for_cuda(
    forward: Callable, backward: Callable | None, why_unable: Callable, library: Library = LIBRARY
) -> Implementation:
    """Return the implementation by CUDA kernels; `forward` and `backward` take the library first."""
    return Implementation(
        "cuda",
        functools.partial(forward, library),
        functools.partial(backward, library) if backward else None,
        "CUDA C++",
        devices=("cuda",),
        why_unavailable=why_unavailable,
        why_unable=why_unable,
    )
