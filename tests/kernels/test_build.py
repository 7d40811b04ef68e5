"""Installing without a compiler."""

import os
import subprocess
import sys

from conftest import ROOT


def test_installs_and_computes_without_a_compiler(tmp_path):
    site = tmp_path / "site"
    source = tmp_path / "source"
    ignored = ["--exclude=*.so", "--exclude=build", "--exclude=*.egg-info"]
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "mambavision", "kernels")
    source.mkdir()
    copy = subprocess.Popen(["tar", "-C", ROOT, *ignored, "-c", *names], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-C", source, "-x"], stdin=copy.stdout, check=True)
    assert copy.wait() == 0

    environment = os.environ | {"CXX": str(tmp_path / "no such compiler")}
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-v"]
    result = subprocess.run(
        [*install, "--target", site, source], env=environment, capture_output=True, text=True, check=True
    )
    assert "the kernels run in PyTorch, which is slower, because compiling them failed" in result.stdout + result.stderr
    assert not list(site.rglob("*.so"))

    program = "from vision_kernels.backends import OPERATORS, overview; print(overview()); print(OPERATORS)"
    environment = os.environ | {"PYTHONPATH": str(site)}
    overview = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "not built: install a C++ compiler (g++ or clang++), then this package again" in overview
    assert overview.count("active on cpu") == overview.count("Operator(name=")
