"""The CUDA kernels, built for the CPU by a C++ compiler; see emulator/cuda_runtime.h."""

import fcntl
import functools
import hashlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from checkout import ROOT
from vision_kernels.backends import Operator
from vision_kernels.cuda import Library

BACKEND = "cuda-emulated"
_COMPILER = shutil.which("g++")  # its inline assembler and _Float16
_HEADERS = Path(__file__).with_name("emulator")
_SOURCES = ROOT / "kernels" / "csrc"
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", f"-I{_HEADERS}"]


@functools.cache
def _library() -> Library | None:
    """Build the library, unless an earlier run built the same sources; return None if it does not compile."""
    sources = sorted((_SOURCES / "cuda").glob("*.cu"))
    parts = [*sources, *(_SOURCES / "cuda").glob("*.*h"), _SOURCES / "view.h", *_HEADERS.iterdir(), Path(__file__)]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in sorted(parts))).hexdigest()[:16]
    folder = ROOT / "build" / "emulated"
    target = folder / f"{digest}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes builds, the others wait
        return Library(target) if target.exists() or _build(sources, target) else None


def _build(sources: list[Path], target: Path) -> bool:
    """Compile and link; return whether that worked."""
    objects = {source: target.with_name(f"{source.stem}.o") for source in sources}
    commands = [[_COMPILER, *_FLAGS, "-x", "c++", "-c", source, "-o", out] for source, out in objects.items()]
    running = [subprocess.Popen(command) for command in commands]
    statuses = [process.wait() for process in running]
    if any(statuses):
        return False
    unfinished = target.with_suffix(".unfinished")
    subprocess.run([_COMPILER, "-shared", *objects.values(), "-o", unfinished], check=True)
    unfinished.replace(target)
    return True


@functools.cache
def why_unavailable() -> str | None:
    if _COMPILER is None:
        return "no g++"
    probe = [_COMPILER, "-x", "c++", "-fsyntax-only", "-"]
    able = subprocess.run(probe, input="_Float16 half;", text=True, capture_output=True).returncode == 0
    return None if able else "g++ has no _Float16: take version 13 or newer"


def add_emulated(operator: Operator) -> None:
    """Append the emulated CUDA kernels to the implementations of an operator on the CPU."""
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
