"""The demo: train, score and predict with a small UPerNet, on the CPU, with the commands of the README.

The pictures show handwritten digits on photographs, both from scikit-learn; see `mambavision.openmmlab.scenes`. If the
demo of classification has been run, the backbone starts from what it learned there, with the same scans held out.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from mambavision.openmmlab.scenes import Options, write_scenes

HERE = Path(__file__).resolve().parent
CLASSIFIER = HERE.parent / "classification" / "configs" / "mambavision" / "mambavision_digits.yaml"
CLASSIFIER_RUNS = HERE.parent / "output" / "demo" / "runs"
# Many digits of much the same size: pixels learn which digit they are of from few other pixels, and with large digits,
# two on a picture, the model of this size had not told them apart after 600 iterations.
SCENES = Options(train=1500, val=150, side=128, digit_sides=(32, 44), most=8, angle=10)
REQUIRED_MIOU = 65.0
RESULTS = "results.json"
_COLUMNS, _ROWS, _SIDE = 3, 4, 240  # of the sheet; pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mamba_vision/upernet_mamba_vision_digits.py", help="to train")
    parser.add_argument("--out", default=str(HERE.parent / "output" / "demo-segmentation"), help="folder to write to")
    args = parser.parse_args()
    os.chdir(HERE)
    if not Path(args.config).is_file():
        parser.error(f"--config {args.config}: no such file in {HERE}")
    out = Path(os.path.relpath(args.out))
    scenes = out / "scenes"
    print(f"data: digits on photographs, in {scenes.resolve()}", flush=True)
    write_scenes(scenes, "ade20k", SCENES)

    signal.signal(signal.SIGINT, lambda *_: None)  # the programs receive Ctrl-C too, and say how far they came
    folder = run_folder(out / "runs", Path(args.config))
    options = ["--resume"] if folder.exists() else []
    if options:
        print(f"going on with an interrupted run; to start anew, delete {folder.resolve()}", flush=True)
    options += starting_weights()
    seconds = _run(scenes, "train.py", args.config, "--work-dir", folder, *options)
    checkpoint = Path(os.path.relpath((folder / "last_checkpoint").read_text().strip()))
    _run(scenes, "test.py", args.config, checkpoint, "--work-dir", folder / "test")
    examples = enlarged(scenes / "images" / "validation", folder / "examples")
    weights = ("--config", args.config, "--checkpoint", checkpoint, "--device", "cpu")
    _run(scenes, "predict.py", *examples, *weights, "--out", folder / "predictions", quiet=True)
    miou = json.loads(max((folder / "test").glob("*/*.json")).read_text())["mIoU"]
    sheet = write_sheet(folder / "predictions", folder / "predictions.png")
    (folder / RESULTS).write_text(json.dumps({"mIoU": miou}))
    _print_outcome(miou, seconds, sheet)
    if miou < REQUIRED_MIOU:
        sys.exit(f"error: mIoU {miou:.1f} is below {REQUIRED_MIOU:.1f}")


def run_folder(runs: Path, config: Path) -> Path:
    """Return the folder of an interrupted run of the same config, or else of a new run."""
    recipe = _digest(config)
    interrupted = [folder for folder in runs.glob(f"*-{recipe}") if not (folder / RESULTS).exists()]
    return max(interrupted, default=runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe}")


def starting_weights() -> list[str]:
    """Return the options that start from the newest complete run of the demo of classification, if there is one."""
    runs = CLASSIFIER_RUNS.glob(f"*-{_digest(CLASSIFIER)}")
    classifier = max((run for run in runs if (run / "validation.json").exists()), default=None)
    if classifier is None:
        print("the backbone starts from scratch: the demo of classification has not been run", flush=True)
        return []
    weights = os.path.relpath(classifier / "model_best.pth.tar")
    print(f"the backbone starts from the demo of classification, {weights}", flush=True)
    return ["--cfg-options", f"model.backbone.pretrained={weights}"]


def enlarged(source: Path, folder: Path) -> list[Path]:
    """Write the first pictures of a folder larger, so that there is room for a legend beside them."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    files = []
    for file in sorted(source.iterdir())[: _COLUMNS * _ROWS]:
        files.append(folder / f"{file.stem}.png")
        Image.open(file).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(files[-1])
    return files


def write_sheet(folder: Path, sheet: Path) -> Path:
    """Write the pictures of a folder on one sheet."""
    from PIL import Image

    pictures = [Image.open(file) for file in sorted(folder.glob("*.png"))[: _COLUMNS * _ROWS]]
    width, height = pictures[0].size
    canvas = Image.new("RGB", (_COLUMNS * width, _ROWS * height), "white")
    for index, picture in enumerate(pictures):
        canvas.paste(picture, (index % _COLUMNS * width, index // _COLUMNS * height))
    canvas.save(sheet)
    return sheet


def _digest(config: Path) -> str:
    return hashlib.sha256(config.read_bytes()).hexdigest()[:8]


def _run(scenes: Path, program: str, *arguments: str | Path, quiet: bool = False) -> float:
    """Run a program of the folder tools on a data set, and return the seconds it took."""
    command = ["python", f"tools/{program}", *map(str, arguments)]
    print(f"\n$ cd semantic_segmentation; SCENES_ROOT={shlex.quote(str(scenes))} {shlex.join(command)}", flush=True)
    started = time.monotonic()
    status = subprocess.run(
        [sys.executable, *command[1:]],
        stdout=subprocess.DEVNULL if quiet else None,
        env={**os.environ, "SCENES_ROOT": str(scenes)},
    ).returncode
    if status in (130, 143):
        print("interrupted; start the demo again, and it goes on from there", file=sys.stderr)
    if status:
        sys.exit(status)
    return time.monotonic() - started


def _print_outcome(miou: float, seconds: float, sheet: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="UPerNet on a small MambaVision", show_header=False, title_justify="left")
    table.add_row("mIoU on held-out digits and photographs", f"{miou:.1f}")
    table.add_row("time of this training", f"{seconds:.0f} s")
    table.add_row("picture", str(sheet.resolve()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
