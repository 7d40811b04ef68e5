"""Every way by which a program or function comes to open a checkpoint refuses one that attacks.

The programs and their options are read off the programs themselves, so that a new one cannot be forgotten here.
"""

import ast
import re

import pytest
import torch
from PIL import Image

import mambavision
from checkout import ROOT, SOURCES
from entry_points import PROGRAMS, parser_of, run
from hostile import HOSTILE, archive, mapping, storage, tensor
from mambavision.checkpoint import load_pretrained, read_checkpoint
from mambavision.errors import CheckpointError
from small_models import SMALL
from small_runs import SETTING

SAMPLES = [*sorted((ROOT / "tests" / "data" / "hostile").glob("*.pth")), "shell"]
_OPENS = re.compile(r"checkpoint|resume|load.?from|initial|pretrained")


def options_that_open(program):
    """Return the options of a program that name a checkpoint; that of a positional one is empty."""
    return [
        action.option_strings[-1] if action.option_strings else ""
        for action in parser_of(program)._actions
        if _OPENS.search(action.dest) and action.nargs != 0 and action.type is None and not action.choices
    ]


ENTRIES = [(program, option) for program in PROGRAMS for option in options_that_open(program)]


def test_the_programs_are_found():
    assert {"classification/train.py", "object_detection/tools/test.py", "semantic_segmentation/tools/predict.py"} <= {
        program for program, _ in ENTRIES
    }
    assert len(ENTRIES) >= 13


@pytest.fixture
def evil(request, tmp_path):
    """A checkpoint that attacks."""
    if request.param != "shell":
        return request.param
    body = mapping(state_dict=mapping(weight=tensor(storage())), meta=HOSTILE["shell"])
    return archive(tmp_path / "shell.pth", body, {"0": b"\0" * 16})


@pytest.fixture
def words(digits, coco_scenes, tmp_path, monkeypatch):
    """Options that each program needs besides."""
    monkeypatch.setenv("SCENES_ROOT", str(coco_scenes))
    monkeypatch.setenv("ADE20K_ROOT", str(tmp_path))
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    small = ROOT / "tests" / "openmmlab"
    predicting = [image, "--out", tmp_path / "out", "--device", "cpu"]
    return {
        "classification/train.py": [*SETTING, "--data-dir", digits],
        "classification/validate.py": ["--data-dir", digits, "--device", "cpu", "--workers", "0"],
        "classification/predict.py": predicting,
        "classification/activation_map.py": predicting,
        "classification/receptive_field.py": predicting,
        "object_detection/tools/train.py": [small / "small_detector.py", "--work-dir", tmp_path / "run"],
        "object_detection/tools/test.py": [small / "small_detector.py", "--work-dir", tmp_path / "run"],
        "object_detection/tools/predict.py": [*predicting, "--config", small / "small_detector.py"],
        "semantic_segmentation/tools/train.py": [small / "small_segmenter.py", "--work-dir", tmp_path / "run"],
        "semantic_segmentation/tools/test.py": [small / "small_segmenter.py", "--work-dir", tmp_path / "run"],
        "semantic_segmentation/tools/predict.py": [*predicting, "--config", small / "small_segmenter.py"],
    }


def check_refusal(capsys, tmp_path, path):
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert str(path) in error
    assert not list(tmp_path.rglob("canary"))


# Each entry gets one of the files in turn: that each of them is refused is tested of the functions below.
def in_turn(entries):
    return [(*entry, SAMPLES[number % len(SAMPLES)]) for number, entry in enumerate(entries)]


@pytest.mark.parametrize(("program", "option", "evil"), in_turn(ENTRIES), indirect=["evil"])
def test_programs_refuse(program, option, evil, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [option, evil] if option else [evil]
    with pytest.raises(SystemExit) as end:
        run(program, monkeypatch, *words[program], *given)
    torch.use_deterministic_algorithms(False)
    assert end.value.code == 65
    check_refusal(capsys, tmp_path, evil)


@pytest.mark.parametrize(
    ("key", "evil"),
    in_turn([("load_from",), ("model.backbone.pretrained",), ("model.backbone.init_cfg",)]),
    indirect=["evil"],
)
def test_configs_refuse(key, evil, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program = "object_detection/tools/train.py"
    setting = f"{key}.type=Pretrained {key}.checkpoint={evil}" if key.endswith("init_cfg") else f"{key}={evil}"
    others = ["model.backbone.pretrained=None"] if key.endswith("init_cfg") else []
    with pytest.raises(SystemExit) as end:
        run(program, monkeypatch, *words[program], "--cfg-options", *setting.split(), *others)
    assert end.value.code == 65
    check_refusal(capsys, tmp_path, evil)


FUNCTIONS = {
    "mambavision.load_checkpoint": lambda path: mambavision.load_checkpoint(_small(), path),
    "mambavision.load_checkpoint, not strict": lambda path: mambavision.load_checkpoint(_small(), path, strict=False),
    "mambavision.create_model": lambda path: _small(checkpoint_path=path),
    "load_pretrained": lambda path: load_pretrained(_small(), path),
    "read_checkpoint": read_checkpoint,
}


def _small(**arguments):
    return mambavision.create_model("mamba_vision_T", **SMALL["mamba_vision_T"], **arguments)


@pytest.mark.parametrize("evil", SAMPLES, indirect=True, ids=lambda each: getattr(each, "stem", each))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_refuse(function, evil):
    with pytest.raises(CheckpointError):
        FUNCTIONS[function](evil)


def test_downloads_are_read_by_the_same_rules(tmp_path, monkeypatch):
    """mmengine reads those of all its addresses by one function."""
    from mmengine.runner import CheckpointLoader

    import mambavision.openmmlab  # noqa: F401

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda url, path: archive(path, mapping(x=HOSTILE["shell"])))
    for address in ("https://example.org/evil.pth", "torchvision://resnet18"):
        with pytest.raises(CheckpointError, match=r"refused.*posix\.system"):
            CheckpointLoader.load_checkpoint(address, map_location="cpu", logger=None)


READERS = {"torch.load", "pickle.load", "pickle.loads", "np.load", "numpy.load", "joblib.load", "torch.jit.load"}
MAY_READ = {"mambavision/checkpoint.py": {"torch.load"}}  # if the user trusts the file


@pytest.mark.parametrize("path", [path for path in SOURCES if not path.startswith("kernels/benchmarks")])
def test_nothing_else_reads_pickles(path):
    calls = {
        ast.unparse(node.func) for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)
    }
    assert calls & READERS <= MAY_READ.get(path, set())
