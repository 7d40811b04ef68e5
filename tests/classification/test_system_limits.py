"""train.py where the system gives little: files, shared memory, room for its output, or a locale without UTF-8."""

import os
import shutil
import subprocess
import sys

import pytest

from checkout import ROOT
from mambavision.errors import IO_FAILURE
from small_runs import SETTING

TRAIN = [sys.executable, str(ROOT / "classification" / "train.py")]


@pytest.fixture
def train(digits, tmp_path):
    def start(*words, before=(), **others):
        words = [*SETTING, "--data-dir", str(digits), "--epochs", "1", "--warmup-epochs", "0", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **others.pop("environment", {})}
        others = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **others}
        return subprocess.run([*before, *TRAIN, *words], cwd=tmp_path, env=environment, text=True, **others)

    return start


def sentence(finished):
    """Return the last words of a program, which it was ended by."""
    assert finished.returncode == IO_FAILURE, finished.stderr
    return finished.stderr.splitlines()[-1]


@pytest.mark.parametrize("descriptors", [16, 24])
def test_few_open_files(train, descriptors):
    limit = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh"]
    assert sentence(train("--workers", "2", before=limit)).startswith(
        "error: too many open files for this process; raise the limit (see ulimit -n), or lower the number of"
    )


@pytest.fixture(scope="module")
def without_shared_memory():
    """The beginning of a command that runs where /dev/shm cannot be written."""
    script = 'mount --make-rprivate / && mount -t tmpfs -o ro none /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    return command


def test_shared_memory_is_needed_by_workers_only(train, without_shared_memory):
    assert train("--workers", "0", before=without_shared_memory).returncode == 0
    last = sentence(train("--workers", "1", before=without_shared_memory))
    assert last.startswith("error: /dev/shm: data loader workers cannot use it (")
    assert last.endswith("or load data without workers (--workers 0; num_workers=0 in configs).")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not on this system")
def test_output_that_cannot_be_written(train, tmp_path):
    with open("/dev/full", "w") as full:
        finished = train("--tag", "full", stdout=full, environment={"PYTHONUNBUFFERED": ""})
    assert finished.returncode == 74
    (line,) = finished.stderr.splitlines()
    assert line == (
        "error: standard output: cannot be written (No space left on device); results in files are complete."
    )
    (log,) = tmp_path.glob("output/train/full/*/train.log")
    assert "epoch 0: training loss" in log.read_text()


def test_recipes_are_utf_8_in_any_locale(train, tmp_path):
    (tmp_path / "recipe.yaml").write_text("# für die Prüfung\nseed: 3\n", encoding="utf-8")
    (tmp_path / "named.yaml").write_text("tag: prüfung\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    finished = train("--config", "recipe.yaml", environment=ascii_only)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert sentence(train("--config", "named.yaml", environment=ascii_only)) == (
        r"error: 'pr\xfcfung': file names cannot contain such characters in this locale (ascii); set PYTHONUTF8=1 or "
        "LC_ALL=C.UTF-8."
    )
    finished = train("--config", "named.yaml", environment={"LC_ALL": "C"})
    assert (finished.returncode, finished.stderr) == (0, "")
    assert [*tmp_path.glob("output/train/prüfung/*/train.log")]
