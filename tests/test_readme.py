"""The README's commands and Python lines: cheap ones are run, the others are parsed by the programs' own parsers."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.models import get_pretrained_cfg

import mambavision
from conftest import ROOT, load_program
from engine.options import (
    activation_map_options,
    predict_options,
    receptive_field_options,
    throughput_options,
    train_options,
    validate_options,
)
from mambavision.complexity import complexity

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def commands():
    """Return every command with the folder that it is to be run in."""
    folder, found = ".", []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("cd "):
                folder = line.removeprefix("cd ")
            found.append((folder, line))
    return found


CLASSIFICATION = {
    "train.py": train_options,
    "validate.py": validate_options,
    "predict.py": predict_options,
    "throughput.py": throughput_options,
    "receptive_field.py": receptive_field_options,
    "activation_map.py": activation_map_options,
    "./train.sh": train_options,
    "./test.sh": validate_options,
}


def parse_openmmlab(folder, program, words):
    """Parse the words of a command with its program's own parser, and build what its config says."""
    from mambavision.openmmlab.config import load_config
    from mambavision.openmmlab.training.run import options_of_test, options_of_training

    name = Path(program).stem
    if name.startswith("dist_"):
        name = name.removeprefix("dist_")
        gpus = words.pop({"train": 1, "test": 2}[name])
        assert gpus.isdigit()
    options = {"train": options_of_training, "test": options_of_test}.get(name)
    args = options(words) if options else load_program(f"{folder}/{program}").options(words)
    assert (ROOT / folder / program).is_file()
    if "config" in args:
        load_config(args.config, args.cfg_options)


@pytest.mark.parametrize(("folder", "command"), commands())
def test_command(folder, command, monkeypatch, tmp_path):
    words = shlex.split(command)
    # Variables, srun, torchrun and their options may stand in front.
    start = next((index for index, word in enumerate(words) if word in CLASSIFICATION or "tools/" in word), 0)
    program = words[start]
    monkeypatch.chdir(ROOT / folder)
    if folder == "classification" and program in CLASSIFICATION:
        args = CLASSIFICATION[program](words[start + 1 :])
        names = args.model if isinstance(args.model, list) else [args.model or "mamba_vision_T"]
        for name in names:
            assert mambavision.list_models(name) or mambavision.factory.check_model_name(name) is None
        assert (ROOT / folder / program).is_file()
    elif "tools/" in program:
        parse_openmmlab(folder, program, words[start + 1 :])
    elif words[:3] == ["python", "demo.py", "--config"]:
        assert Path(words[3]).is_file()
    elif words[0] == "make":
        command = ["make", "--dry-run", "VENV=" + str(tmp_path), *words[1:]]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        assert (ROOT / words[-1]).is_file()
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
def test_python_lines(lines, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, env=environment, check=True)


def test_table_of_models_is_what_the_command_counts():
    """GMACs, and for VMamba the operations as its authors count them."""
    rows = re.findall(r"^\| (\w+)(?: \([^)]+\))? \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE)
    without_accuracy = {"segman_encoder_l2"}
    assert {name for name, *_ in rows} == set(mambavision.list_models()) - without_accuracy
    for name, size, params, operations in rows:
        with torch.device("meta"):
            model = mambavision.create_model(name)
        assert model.pretrained_cfg["input_size"][-1] == int(size)
        counts = complexity(model, model.pretrained_cfg["input_size"])
        counted = counts.gflops_vmamba if "vmamba" in name else counts.gmacs
        assert (f"{counts.params / 1e6:.1f}", f"{counted:.2f}") == (params, operations), name


def test_links_to_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_weights_are_linked_with_their_licence():
    for name in mambavision.list_models("mamba_vision*"):
        config = get_pretrained_cfg(name)
        assert f"(https://huggingface.co/{config.hf_hub_id})" in README
        assert "non-commercial" in config.license
