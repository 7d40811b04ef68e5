"""Build the compiled kernels: for the CPU if there is a C++ compiler, for NVIDIA GPUs if there is a CUDA toolkit.

The libraries have a plain C interface and include no header of Python or torch, so building needs neither of them and
one wheel serves every version of both. A library that cannot be built is skipped with a warning that says why: the
package is installed nevertheless, and falls back to the other backends, finally PyTorch.

The repository's own setup.py also runs this file, so that `pip install .` builds the same kernels there and here.

Environment variables:
    CXX: Command of the C++ compiler for the CPU kernels, instead of c++, g++ or clang++.
    VISION_KERNELS_CUDA: 1 builds the CUDA kernels, 0 does not. By default they are built if there are nvcc and a GPU.
    CUDA_HOME, CUDA_PATH: Folder of the CUDA toolkit, if nvcc is not in PATH.
    TORCH_CUDA_ARCH_LIST: GPUs to build for, as for PyTorch's extensions ("8.0;9.0+PTX"). By default those of this
        machine, and without one all generations that the toolkit knows.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-ffp-contract=fast", "-Wall", "-Wno-maybe-uninitialized"]  # the latter: false alarms inside immintrin.h
AVX2 = ["-mavx2", "-mfma"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = AVX2
    INSTRUCTION_SETS["avx512"] = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
OLDEST_GPU = 75  # the kernels use instructions of this compute capability
CUDA_FLAGS = ["-std=c++17", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class BuildKernels(build_ext):
    """Compile the libraries `_cpu.so` and `_cuda.so`."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # the same name for every Python

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        build, otherwise = {
            "_cpu": (self._build_cpu, "the kernels run in PyTorch on CPUs, which is slower"),
            "_cuda": (self._build_cuda, "there are no CUDA kernels, and GPUs use the next best ones"),
        }[target.stem]
        try:
            build(target)
        except CannotBuildError as error:
            self.warn(f"{otherwise}, because {error}")
        except (subprocess.CalledProcessError, OSError) as error:
            self.warn(f"{otherwise}, because compiling them failed: {error}")

    def _build_cpu(self, target: Path) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            raise CannotBuildError("there is no C++ compiler: install g++ and install again")
        commands = {}
        for source in sorted((SOURCES / "cpu").glob("*.cpp")):
            sets = {"library": []} if source.stem == "library" else INSTRUCTION_SETS
            for name, flags in sets.items():
                command = [*shlex.split(compiler), *FLAGS, *flags, f"-DVK_ISA={name}"]
                commands[f"{source.stem}_{name}.o"] = [*command, "-c", str(source)]
        self._compile(commands, [*shlex.split(compiler), "-shared"], target)

    def _build_cuda(self, target: Path) -> None:
        compiler = cuda_compiler()
        if compiler is None:
            target.unlink(missing_ok=True)  # of an earlier build
            return
        flags = [*CUDA_FLAGS, *architectures(compiler)]
        commands = {
            f"{source.stem}_cuda.o": [compiler, *flags, "-c", str(source)]
            for source in sorted((SOURCES / "cuda").glob("*.cu"))
        }
        self._compile(commands, [compiler, "-shared", "-cudart", "static"], target)

    def _compile(self, commands: dict[str, list[str]], link: list[str], target: Path) -> None:
        """Run the commands, each for one object file, and link the objects, unless the library is up to date."""
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        recipe, written = folder / f"{target.stem}.commands", repr((commands, link))
        newest = max(path.stat().st_mtime for path in [Path(__file__), *SOURCES.rglob("*.*")])
        unchanged = recipe.exists() and recipe.read_text(encoding="utf-8") == written
        if unchanged and target.exists() and target.stat().st_mtime > newest:
            return
        objects = {folder / name: command for name, command in commands.items()}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            run = [pool.submit(subprocess.run, [*command, "-o", out], check=True) for out, command in objects.items()]
        for each in run:
            each.result()
        unfinished = target.with_suffix(f".so.{os.getpid()}")
        subprocess.run([*link, *objects, "-o", unfinished], check=True)
        unfinished.replace(target)  # a process that has the old library loaded keeps it
        recipe.write_text(written, encoding="utf-8")


class CannotBuildError(Exception):
    """A library cannot be built; the message says why and what to do."""


def cuda_compiler() -> str | None:
    """Return the path of nvcc, or None if no CUDA kernels are built."""
    wanted = os.environ.get("VISION_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise CannotBuildError(f"VISION_KERNELS_CUDA={wanted} is neither 1 nor 0")
    if wanted == "0" or (not wanted and not has_gpu()):
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = next((path for home in homes if (path := shutil.which("nvcc", path=Path(home, "bin")))), None)
    found = found or shutil.which("nvcc")
    if found is None and wanted:
        where = f"{' and '.join(homes)} and PATH" if homes else "PATH, and CUDA_HOME is not set"
        raise CannotBuildError(
            f"there is no nvcc in {where}: install the CUDA toolkit, or let CUDA_HOME say where it is"
        )
    return found


def has_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU, not only a toolkit."""
    if Path("/dev/nvidia0").exists():
        return True
    lister = shutil.which("nvidia-smi")  # on WSL there is no such device
    return bool(lister) and subprocess.run([lister, "-L"], capture_output=True).returncode == 0


def architectures(compiler: str) -> list[str]:
    """Return nvcc's options for the GPUs to build for."""
    setting = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,")
    if not setting and has_gpu():
        return ["-arch=native"]
    options = []
    for each in re.split(r"[;,\s]+", setting) if setting else all_generations(compiler):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", each)
        if parts is None:
            raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST contains {each!r}: write it as 8.0 or 9.0+PTX")
        number = "".join(parts.group(1, 2))
        if int(number) >= OLDEST_GPU:  # container images with PyTorch list every GPU that it supports
            number += parts.group(3)
            code = f"[sm_{number},compute_{number}]" if parts.group(4) else f"sm_{number}"
            options.append(f"-gencode=arch=compute_{number},code={code}")
    if not options:
        raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST={setting} names no GPU of compute capability 7.5 or newer")
    return options


def all_generations(compiler: str) -> list[str]:
    """Return the first GPU of every generation that the toolkit supports, the newest with PTX for later ones."""
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    numbers = sorted({int(number) for number in re.findall(r"sm_(\d+)\b", known)})
    first = [number for number in numbers if number == OLDEST_GPU or (number > OLDEST_GPU and number % 10 == 0)]
    return [f"{number // 10}.{number % 10}" for number in first[:-1]] + [f"{first[-1] // 10}.{first[-1] % 10}+PTX"]


class BinaryWheel(bdist_wheel):
    """A wheel for any version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"vision_kernels.{name}", sources=[], optional=True) for name in ("_cpu", "_cuda")],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": BinaryWheel},
    )
