"""The demos of detection and segmentation: what they run, and that they go on with what was interrupted."""

import itertools
import json
import sys

import numpy as np
import pytest
import scene_demo as shared
from PIL import Image

from checkout import ROOT, load_program

NAMES = {"object_detection": "demo-detection", "semantic_segmentation": "demo-segmentation"}


@pytest.fixture(params=["detection", "segmentation"])
def task(request):
    return load_program(f"assets/demo/{request.param}.py").DEMO


@pytest.fixture
def run(task, monkeypatch, tmp_path):
    """Run a demo with programs that only leave the files it reads; return their words."""
    starts = itertools.count()
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    out = tmp_path / "out"
    (out / "scenes" / task.held_out).mkdir(parents=True)
    for number in range(2):
        picture.save(out / "scenes" / task.held_out / f"{number}.png")

    def start(*options, value=99.0, completes=True):
        commands = []

        def pretend(name, *words, environment, quiet=False):
            assert (ROOT / task.task.name / name).is_file()
            assert environment["SCENES_ROOT"].endswith("scenes")
            words = [str(word) for word in words]
            commands.append([name, *words])
            if name == "tools/train.py":
                folder = (task.task / words[words.index("--work-dir") + 1]).resolve()
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "last_checkpoint").write_text(str(folder / "last.pth"))
                if not completes:
                    sys.exit(130)
            elif name == "tools/test.py":
                results = (task.task / words[words.index("--work-dir") + 1]).resolve() / "now" / "now.json"
                results.parent.mkdir(parents=True, exist_ok=True)
                results.write_text(json.dumps({score.key: value / score.scale for score in task.scores}))
            else:
                predictions = (task.task / words[words.index("--out") + 1]).resolve()
                predictions.mkdir(exist_ok=True)
                picture.save(predictions / "0.png")
            return 1.0

        monkeypatch.setattr(shared, "run_program", pretend)
        monkeypatch.setattr(shared, "write_scenes", lambda *_: True)
        monkeypatch.setattr("time.strftime", lambda pattern: f"start-{next(starts)}")
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(out), *options])
        monkeypatch.chdir(ROOT)
        if completes:
            task.main(NAMES[task.task.name])
        else:
            with pytest.raises(SystemExit):
                task.main(NAMES[task.task.name])
        return commands

    return start


def work_dir(words):
    return words[words.index("--work-dir") + 1]


def test_interrupted_demo_goes_on(run):
    (interrupted,) = run(completes=False)
    assert "--resume" not in interrupted
    train, test, predict = run()
    assert "--resume" in train
    assert work_dir(train) == work_dir(interrupted)
    assert [words[0] for words in (train, test, predict)] == ["tools/train.py", "tools/test.py", "tools/predict.py"]
    assert "--resume" not in run()[0]  # that run is complete


def test_scores_below_the_floor_are_an_error(run, capsys):
    with pytest.raises(SystemExit, match=r"error: .* 50\.0 is below"):
        run(value=50.0)
    assert "50.0" in capsys.readouterr().out


def test_demo_starts_from_the_classifier(run, task, monkeypatch, tmp_path):
    recipes = []
    monkeypatch.setattr(shared, "complete_run", lambda runs, recipe, results: recipes.append(recipe.stem) or tmp_path)
    configs = sorted((task.task / "configs").glob("*/*_digits.py"))
    for config in configs:
        assert f"model.backbone.pretrained={tmp_path / 'model_best.pth.tar'}" in run("--config", str(config))[0]
    assert recipes == [config.parent.name.replace("_", "") + "_digits" for config in configs]
    monkeypatch.setattr(shared, "complete_run", lambda *_: None)
    assert "--cfg-options" not in run()[0]
