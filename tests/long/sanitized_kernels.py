"""The conformance tests of the C++ kernels, with the kernels built for AddressSanitizer and UndefinedBehaviorSanitizer.

The package is copied beside the sanitized library, so that the tests import it from there and nothing else changes.
"""

import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkout import ROOT
from vision_kernels import native

FLAGS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# Vectors are read at any address on purpose, and the lanes of a vector of shifted integers overflow as they should.
FLAGS += ["-fno-sanitize=alignment,signed-integer-overflow,shift"]
REPORT = "report"
TESTS = ("conv1d_silu", "cross_scan", "neighborhood_attention", "nonfinite", "selective_scan", "ss2d")


def runtimes(compiler):
    """Paths of the sanitizers' libraries, which must be loaded before everything else."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        found.append(path.strip())
    return found if all(Path(path).is_absolute() for path in found) else None


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package with a sanitized library."""
    compiler = shutil.which("g++")
    if compiler is None or runtimes(compiler) is None:
        pytest.skip("needs g++ and its sanitizers")
    folder = tmp_path_factory.mktemp("sanitized")
    target = folder / "vision_kernels"
    shutil.copytree(ROOT / "kernels" / "vision_kernels", target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    recipe = runpy.run_path(str(ROOT / "kernels" / "setup.py"), run_name="recipe")
    plain = [flag for flag in recipe["FLAGS"] if flag not in ("-O3", "-Wall")]
    commands = {}
    for source in sorted((ROOT / "kernels" / "csrc" / "cpu").glob("*.cpp")):
        sets = {"library": []} if source.stem == "library" else recipe["INSTRUCTION_SETS"]
        for name, flags in sets.items():
            target_object = folder / f"{source.stem}_{name}.o"
            commands[target_object] = [compiler, *plain, *FLAGS, *flags, f"-DVK_ISA={name}", "-c", source]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda out: subprocess.run([*commands[out], "-o", out], check=True), commands))
    subprocess.run([compiler, "-shared", *FLAGS, *commands, "-o", target / "_cpu.so"], check=True)
    return folder, runtimes(compiler)


def sanitized(package, *command):
    folder, libraries = package
    for report in folder.glob(f"{REPORT}*"):
        report.unlink()
    environment = os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={folder / REPORT}",  # pytest would keep what is printed
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_copy_is_tested(package):
    program = "import vision_kernels.native as n; print(n.LIBRARY, n.why_unavailable('baseline'))"
    assert sanitized(package, "-c", program).stdout.split() == [str(package[0] / "vision_kernels" / "_cpu.so"), "None"]


@pytest.mark.parametrize("name", TESTS)
def test_conformance(package, name):
    chosen = " or ".join(native.INSTRUCTION_SETS)  # the other backends were not built here
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "-k", chosen]
    result = sanitized(package, *arguments, f"tests/kernels/test_{name}.py")
    reports = [each.read_text() for each in package[0].glob(f"{REPORT}*")]
    assert not reports, reports[0][:5_000]
    assert result.returncode == 0, (result.stdout + result.stderr)[-10_000:]
    assert int(result.stdout.rsplit(" passed", 1)[0].split()[-1]) > 10
