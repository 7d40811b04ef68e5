"""Demos of detection and segmentation: train, score and predict on scenes, with documented commands."""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from demo_run import complete_run, leave_interrupts_to_programs, print_outcome, run_folder, run_program
from scenes import Layout, Options, write_scenes

_RESULTS = "results.json"
_EXAMPLES = 12
# Folder of a demo's config -> recipe of the classification demo that trains the same backbone.
_CLASSIFIERS = {
    "mamba_vision": "mambavision/mambavision_digits.yaml",
    "vmamba": "vmamba/vmamba_digits.yaml",
    "segman": "segman/segman_digits.yaml",
}
_RECIPES = Path("../classification/configs")
_CLASSIFIER_RUNS = Path("../output/demo/runs")
_CLASSIFIER_RESULTS = "validation.json"


class Score(NamedTuple):
    """A score of a demo: name, key in the results of test.py, factor that makes it percent, and required minimum."""

    name: str
    key: str
    scale: float
    floor: float


@dataclass(frozen=True)
class Demo:
    """A demo of a task.

    Attributes:
        title: Title of the results.
        task: Folder of the task.
        config: Config to train, relative to that folder.
        layout: Layout of the scenes on disk.
        held_out: Folder of the held-out pictures, relative to that of the scenes.
        scores: Scores to reach.
        scenes: Content of the scenes.
        side: Height and width to which example pictures are enlarged, in pixels, to have room for labels.
        columns: Columns of the sheet of examples.
    """

    title: str
    task: Path
    config: str
    layout: Layout
    held_out: str
    scores: tuple[Score, ...]
    scenes: Options = field(default_factory=Options)
    side: int = 320
    columns: int = 4

    def main(self, name: str) -> None:
        """Run the demo with the arguments of the command line; `name` is its folder below ``output``."""
        parser = argparse.ArgumentParser(description=self.title)
        parser.add_argument("--config", default=self.config, help="to train (default: %(default)s)")
        parser.add_argument("--out", default=str(self.task.parent / "output" / name), help="folder to write to")
        args = parser.parse_args()
        os.chdir(self.task)
        if not Path(args.config).is_file():
            parser.error(f"--config {args.config}: no such file in {self.task}")
        out = Path(os.path.relpath(args.out))
        data = out / "scenes"
        print(f"data: digits on photographs, in {data.resolve()}", flush=True)
        write_scenes(data, self.layout, self.scenes)
        self._run(Path(args.config), data, out / "runs")

    def _run(self, config: Path, data: Path, runs: Path) -> None:
        leave_interrupts_to_programs()
        folder = run_folder(runs, config, _RESULTS)
        environment = {"SCENES_ROOT": str(data)}
        options = ["--work-dir", folder, *_starting_weights(config)]
        if folder.exists():
            print(f"resuming an interrupted run; to start over, delete {folder.resolve()}", flush=True)
            options.append("--resume")
        seconds = run_program("tools/train.py", config, *options, environment=environment)
        checkpoint = Path(os.path.relpath((folder / "last_checkpoint").read_text(encoding="utf-8").strip()))
        test = folder / "test"
        run_program("tools/test.py", config, checkpoint, "--work-dir", test, environment=environment)
        examples = self._enlarged(data / self.held_out, folder / "examples")
        weights = ("--config", config, "--checkpoint", checkpoint, "--device", "cpu")
        predictions = folder / "predictions"
        run_program("tools/predict.py", *examples, *weights, "--out", predictions, quiet=True, environment=environment)
        written = json.loads(max(test.glob("*/*.json")).read_text(encoding="utf-8"))
        reached = {score: score.scale * written[score.key] for score in self.scores}
        (folder / _RESULTS).write_text(json.dumps({score.name: value for score, value in reached.items()}))
        rows = {f"{score.name} on held-out digits and photographs": f"{value:.1f}" for score, value in reached.items()}
        rows["time of this training"] = f"{seconds:.0f} s"
        rows["predictions"] = self._write_sheet(predictions, folder / "predictions.png")
        print_outcome(f"{self.title}, {config.stem}", rows)
        missed = [
            f"{score.name} {value:.1f} is below {score.floor:.1f}"
            for score, value in reached.items()
            if value < score.floor
        ]
        if missed:
            sys.exit(f"error: {'; '.join(missed)}")

    def _enlarged(self, source: Path, folder: Path) -> list[Path]:
        """Write the first pictures of a folder enlarged to another."""
        from PIL import Image

        folder.mkdir(exist_ok=True)
        files = []
        for file in sorted(source.iterdir())[:_EXAMPLES]:
            files.append(folder / f"{file.stem}.png")
            Image.open(file).resize((self.side, self.side), Image.Resampling.BICUBIC).save(files[-1])
        return files

    def _write_sheet(self, folder: Path, sheet: Path) -> Path:
        """Write the pictures of a folder, which have the same size, on one sheet."""
        from PIL import Image

        files = [file for file in sorted(folder.iterdir()) if file.suffix in (".png", ".jpg")]
        pictures = [Image.open(file) for file in files[:_EXAMPLES]]
        width, height = pictures[0].size
        canvas = Image.new("RGB", (self.columns * width, -(-len(pictures) // self.columns) * height), "white")
        for index, picture in enumerate(pictures):
            canvas.paste(picture, (index % self.columns * width, index // self.columns * height))
        canvas.save(sheet)
        return sheet


def _starting_weights(config: Path) -> list[str]:
    """Return options that start from the classification demo, if it has been run with this backbone."""
    recipe = _CLASSIFIERS.get(config.parent.name)
    classifier = recipe and complete_run(_CLASSIFIER_RUNS, _RECIPES / recipe, _CLASSIFIER_RESULTS)
    if classifier is None:
        print("the backbone starts from scratch: the classification demo has not been run with it", flush=True)
        return []
    weights = classifier / "model_best.pth.tar"
    print(f"the backbone starts from the classification demo, {weights}", flush=True)
    return ["--cfg-options", f"model.backbone.pretrained={weights}"]
