"""The CUDA kernels, built by a C++ compiler for the CPU: see emulator/cuda_runtime.h."""

import functools
import hashlib
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from conftest import ROOT
from vision_kernels.backends import Operator
from vision_kernels.cuda import Library

BACKEND = "cuda-emulated"
_HEADERS = Path(__file__).with_name("emulator")
_SOURCES = ROOT / "kernels" / "csrc"
_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror", f"-I{_HEADERS}"]


@functools.cache
def _library() -> Library | None:
    """Build the library, unless it is there from an earlier run of the same sources; None if it does not compile."""
    sources = sorted((_SOURCES / "cuda").glob("*.cu"))
    parts = [*sources, *(_SOURCES / "cuda").glob("*.*h"), _SOURCES / "view.h", *_HEADERS.iterdir(), Path(__file__)]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in sorted(parts))).hexdigest()[:16]
    folder = ROOT / "build" / "emulated"
    target = folder / f"{digest}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        objects = {source: folder / f"{source.stem}.{os.getpid()}.o" for source in sources}
        compile_ = [[_compiler(), *_FLAGS, "-x", "c++", "-c", source, "-o", out] for source, out in objects.items()]
        running = [subprocess.Popen(command) for command in compile_]
        failed = [process.wait() for process in running]
        if any(failed):
            return None  # kept, so that not every test tries again
        unfinished = target.with_suffix(f".{os.getpid()}")
        subprocess.run([_compiler(), "-shared", *objects.values(), "-o", unfinished], check=True)
        unfinished.replace(target)
        for each in objects.values():
            each.unlink()
    return Library(target)


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")  # its _Float16 and inline assembler


def why_unavailable() -> str | None:
    return None if _compiler() else "no g++"


def add_emulated(operator: Operator) -> None:
    """Add the emulated CUDA kernels to the implementations of an operator on the CPU, the last of them."""
    gpu = next((each for each in operator.implementations if each.backend == "cuda"), None)
    if gpu is None or any(each.backend == BACKEND for each in operator.implementations):
        return
    emulated = replace(
        gpu,
        backend=BACKEND,
        forward=_emulated(gpu.forward),
        backward=gpu.backward and _emulated(gpu.backward),
        summary="CUDA C++ on the CPU",
        devices=("cpu",),
        why_unavailable=why_unavailable,
    )
    operator.implementations = (*operator.implementations, emulated)


def _emulated(function: functools.partial):
    def run(*arguments):
        library = _library()
        if library is None:
            raise RuntimeError("the CUDA kernels do not compile for the emulator; see the first failure's output")
        return function.func(library, *arguments)

    return run
