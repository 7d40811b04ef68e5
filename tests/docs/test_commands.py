"""Commands and Python blocks of the documentation: cheap ones are run, the others parsed by the programs' parsers."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mambavision
from checkout import ROOT, load_program
from engine.options import (
    ActivationMapOptions,
    PredictOptions,
    ReceptiveFieldOptions,
    ThroughputOptions,
    TrainOptions,
    ValidateOptions,
)
from pages import PAGES, blocks

MAKEFILE = (ROOT / "Makefile").read_text()
PYTHON = list(dict.fromkeys(block for page in PAGES for block in blocks(page, "python")))


def commands():
    """Return every command with the folder in which it is run; each page begins at the root."""
    found = {}
    for page in PAGES:
        folder = "."
        for line in "".join(blocks(page, "bash")).splitlines():
            if line.startswith("cd "):
                folder = line.removeprefix("cd ")
            found[folder, line] = None
    return list(found)


CLASSIFICATION = {
    "train.py": TrainOptions.parse,
    "validate.py": ValidateOptions.parse,
    "predict.py": PredictOptions.parse,
    "throughput.py": ThroughputOptions.parse,
    "receptive_field.py": ReceptiveFieldOptions.parse,
    "activation_map.py": ActivationMapOptions.parse,
    "./train.sh": TrainOptions.parse,
    "./test.sh": ValidateOptions.parse,
}


def parse_openmmlab(folder, program, words):
    """Parse the words of a command with its program's own parser, and build its config."""
    from mambavision.openmmlab.config import load_config
    from mambavision.openmmlab.training.options import TestOptions, TrainOptions

    name = Path(program).stem
    if name.startswith("dist_"):
        name = name.removeprefix("dist_")
        gpus = words.pop({"train": 1, "test": 2}[name])
        assert gpus.isdigit()
    options = {"train": TrainOptions.parse, "test": TestOptions.parse}.get(name)
    args = options(words) if options else load_program(f"{folder}/{program}").options(words)
    assert (ROOT / folder / program).is_file()
    if hasattr(args, "config"):
        load_config(args.config, args.cfg_options)


@pytest.mark.parametrize(("folder", "command"), commands())
def test_command(folder, command, monkeypatch, tmp_path):
    words = shlex.split(command)
    # Variables, srun, torchrun and their options may stand in front.
    start = next((index for index, word in enumerate(words) if word in CLASSIFICATION or "tools/" in word), 0)
    program = words[start]
    monkeypatch.chdir(ROOT / folder)
    if folder == "classification" and program in CLASSIFICATION:
        model = CLASSIFICATION[program](words[start + 1 :]).flat()["model"]
        names = model if isinstance(model, list) else [model or "mamba_vision_T"]
        for name in names:
            assert mambavision.list_models(name) or mambavision.factory.check_model_name(name) is None
        assert (ROOT / folder / program).is_file()
    elif "tools/" in program:
        parse_openmmlab(folder, program, words[start + 1 :])
    elif words[0] == "make":
        command = ["make", "--dry-run", "VENV=" + str(tmp_path), *words[1:]]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    elif words == ["pip", "install", "pre-commit"]:
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    elif words[:2] == ["pip", "install"]:
        target = ROOT / words[-1]
        assert target.is_file() or (target / "pyproject.toml").is_file()
    elif words in (["pre-commit", "install"], ["mkdocs", "serve"]):
        pass  # of other projects
    elif words[0] == "source":
        assert words[1:] == [re.search(r"^VENV \?= (.*)$", MAKEFILE, re.MULTILINE)[1] + "/bin/activate"]
    elif words[0] == "cd":
        assert (ROOT / words[1]).is_dir()
    else:
        assert words[:2] == ["python", "-m"]
        last = ["mamba_vision_T"] if words[2] == "mambavision.complexity" else words[3:]  # all take long
        result = subprocess.run([sys.executable, *words[1:3], *last], check=True, capture_output=True, text=True)
        assert result.stdout


@pytest.mark.parametrize("lines", PYTHON, ids=range(len(PYTHON)))
def test_python_lines(lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "documentation", "exec"), {"__name__": "documentation"})
