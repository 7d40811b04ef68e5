"""The demo: what it runs, and that it goes on with what was interrupted. `make demo` is the test of all of it."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest

from checkout import ROOT, load_program

RECIPE = "configs/mambavision/mambavision_digits.yaml"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Run the demo with programs that only leave the files it reads; return the words of train.py."""
    program = load_program("assets/demo/classification.py")
    starts = itertools.count()

    def start(config=RECIPE, completes=True):
        commands = []

        def pretend(name, *words, **options):
            commands.append([name, *map(str, words)])
            words = commands[0]
            folder = tmp_path / "runs" / words[words.index("--experiment") + 1]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "args.yaml").write_text(Path(config).read_text())
            (folder / "summary.csv").write_text("train_images_per_second\n100\n")
            if not completes:
                sys.exit(130)
            if name == "validate.py":
                (folder / program.RESULTS).write_text(json.dumps({"top1": 99.0}))
            return 1.0

        monkeypatch.setattr(program, "run_program", pretend)
        monkeypatch.setattr("time.strftime", lambda pattern: f"start-{next(starts)}")
        monkeypatch.setattr(program, "write_digits", lambda root: None)
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["classification.py", "--config", str(config), "--out", str(tmp_path)])
        monkeypatch.chdir(ROOT / "classification")
        if completes:
            program.main()
        else:
            with pytest.raises(SystemExit):
                program.main()
        return commands[0]

    return start


def experiment(words):
    return words[words.index("--experiment") + 1]


def test_interrupted_demo_goes_on(demo, tmp_path):
    interrupted = demo(completes=False)
    assert "--resume" not in interrupted
    other = Path(shutil.copy(ROOT / "classification" / RECIPE, tmp_path / "other.yaml"))
    other.write_text(other.read_text().replace("epochs: 15", "epochs: 1"))
    assert "--resume" not in demo(other)
    again = demo()
    assert experiment(again) == experiment(interrupted)
    assert again[-4:-2] == ["--resume", "auto"]
    assert "--resume" not in demo()  # that run is complete


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (RECIPE, "mamba_vision_T"),
        ("configs/vmamba/vmamba_digits.yaml", "vmamba_tiny_s1l8"),
        ("configs/segman/segman_digits.yaml", "segman_encoder_t"),
    ],
)
def test_demo_trains_the_model_of_any_recipe(demo, capsys, config, model):
    words = demo(config)
    assert words[words.index("--config") + 1] == config
    assert f"{model} on handwritten digits" in capsys.readouterr().out


def test_demo_says_how_to_use_its_environment(demo, capsys, monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/clone/.venv")
    demo()
    assert capsys.readouterr().out.endswith("source /clone/.venv/bin/activate\n")
