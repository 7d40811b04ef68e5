"""Builds the compiled CPU kernels when there is a C++ compiler. Everything else is in pyproject.toml.

The library has a plain C interface and includes no header of Python or torch, so building needs neither of them, takes
seconds, and one wheel serves every Python and torch. Each kernel is compiled for several instruction sets; which one
runs is decided when it runs. Without a compiler the package installs all the same and computes with PyTorch.
"""

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/csrc/cpu")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-ffp-contract=fast", "-Wall", "-Wno-maybe-uninitialized"]  # the latter: false alarms inside immintrin.h
AVX2 = ["-mavx2", "-mfma"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = AVX2
    INSTRUCTION_SETS["avx512"] = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


class BuildKernels(build_ext):
    """Compiles the kernels with the command in CXX, or c++, g++ or clang++."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # the same name for every Python

    def build_extension(self, extension: Extension) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            self.warn("no C++ compiler: the kernels run in PyTorch, which is slower; install g++ and install again")
            return
        target = Path(self.get_ext_fullpath(extension.name))
        newest = max(path.stat().st_mtime for path in [Path(__file__), *SOURCES.iterdir()])
        if target.exists() and target.stat().st_mtime > newest:
            return
        try:
            self._compile(shlex.split(compiler), target)
        except (subprocess.CalledProcessError, OSError) as error:
            self.warn(f"the kernels run in PyTorch, which is slower, because compiling them failed: {error}")

    def _compile(self, compiler: list[str], target: Path) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        commands = {}
        for source in sorted(SOURCES.glob("*.cpp")):
            sets = {"library": []} if source.stem == "library" else INSTRUCTION_SETS
            for name, flags in sets.items():
                command = [*compiler, *FLAGS, *flags, f"-DVK_ISA={name}", "-c", str(source), "-o"]
                commands[str(folder / f"{source.stem}_{name}.o")] = command
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            run = [pool.submit(subprocess.run, [*command, out], check=True) for out, command in commands.items()]
        for each in run:
            each.result()
        unfinished = target.with_suffix(f".so.{os.getpid()}")
        subprocess.run([*compiler, "-shared", *commands, "-o", str(unfinished)], check=True)
        unfinished.replace(target)  # a process that has the old library loaded keeps it


class BinaryWheel(bdist_wheel):
    """The library does not depend on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("vision_kernels._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": BinaryWheel},
)
