"""Installation without compilers, and compilation of the CUDA kernels."""

import ctypes
import os
import re
import shutil
import subprocess
import sys

import pytest

from checkout import ROOT

INSTALL = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-v", "--target"]


@pytest.fixture
def source(tmp_path):
    """Return a copy of the repository without build outputs."""
    folder = tmp_path / "source"
    folder.mkdir()
    ignored = ["--exclude=*.so", "--exclude=build", "--exclude=*.egg-info"]
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "mambavision", "kernels")
    copy = subprocess.Popen(["tar", "-C", ROOT, *ignored, "-c", *names], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-C", folder, "-x"], stdin=copy.stdout, check=True)
    assert copy.wait() == 0
    return folder


def install(package, site, **environment):
    """Install without the CPU kernels, which take longest to compile; return the output."""
    environment = os.environ | {"CXX": str(site / "no such compiler")} | environment
    result = subprocess.run([*INSTALL, site, package], env=environment, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def in_site(site, program, cwd):
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    ).stdout


OVERVIEW = "from vision_kernels.backends import OPERATORS, overview; print(overview()); print(OPERATORS)"


def test_installs_and_computes_without_a_compiler(source, tmp_path):
    site = tmp_path / "site"
    output = install(source, site, VISION_KERNELS_CUDA="1", CUDA_HOME=str(tmp_path / "nowhere"), CUDA_PATH="", PATH="")
    assert "the kernels run in PyTorch on CPUs, which is slower, because compiling them failed" in output
    assert f"there is no nvcc in {tmp_path / 'nowhere'} and PATH: install the CUDA toolkit" in output
    assert not list(site.rglob("*.so"))

    overview = in_site(site, OVERVIEW, tmp_path)
    assert "not built: install a C++ compiler (g++ or clang++), then this package again" in overview
    assert "not built: install the CUDA toolkit, then this package again with VISION_KERNELS_CUDA=1" in overview
    assert overview.count("active on cpu") == overview.count("Operator(name=")


def test_wrong_settings_are_named(source, tmp_path):
    output = install(source / "kernels", tmp_path / "site", VISION_KERNELS_CUDA="yes")
    assert "because VISION_KERNELS_CUDA=yes is neither 1 nor 0" in output
    output = install(source / "kernels", tmp_path / "other", VISION_KERNELS_CUDA="0")
    assert "CUDA" not in output


CUDA_HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin")


@pytest.mark.skipif(NVCC is None, reason="needs the CUDA toolkit's nvcc")
def test_cuda_kernels_compile(source, tmp_path):
    """Build the operators alone for one GPU, skip one that is too old, and find every function that Python calls."""
    site = tmp_path / "site"
    output = install(
        source / "kernels", site, VISION_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST="7.0 9.0", CUDA_HOME=CUDA_HOME
    )
    assert "there are no CUDA kernels" not in output
    library = ctypes.CDLL(str(site / "vision_kernels" / "_cuda.so"))
    wrappers = "".join(path.read_text() for path in site.glob("vision_kernels/**/*.py") if path.name != "cpu.py")
    called = set(re.findall(r'(?i)library\.call\(\s*"(\w+)"', wrappers))
    assert called >= {"vision_kernels_probe", "conv1d_silu_forward", "selective_scan_backward"}
    assert not [name for name in called if not hasattr(library, name)]
    assert "install the CUDA toolkit" not in in_site(site, OVERVIEW, tmp_path)
