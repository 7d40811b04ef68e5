"""Demo of classification: train, validate and predict on handwritten digits, on the CPU.

The digits are scikit-learn's bundled scans (1797 images of 8x8 pixels from the UCI repository), written as an
ImageNet-style folder tree; every fifth image is held out.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

import yaml
from demo_run import leave_interrupts_to_programs, print_outcome, run_folder, run_program

TASK = Path(__file__).resolve().parents[2] / "classification"
REQUIRED_TOP1 = 98.0
RESULTS = "validation.json"
_HELD_OUT_EVERY = 5
_SIDE = 32  # pixels of the written pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mambavision/mambavision_digits.yaml", help="recipe to train")
    parser.add_argument("--out", default=str(TASK.parent / "output" / "demo"), help="folder to write to")
    args = parser.parse_args()
    os.chdir(TASK)
    if not Path(args.config).is_file():
        parser.error(f"--config {args.config}: no such file in {TASK}")
    out = Path(os.path.relpath(args.out))
    digits, runs = out / "digits", out / "runs"
    write_digits(digits)

    leave_interrupts_to_programs()
    folder = run_folder(runs, Path(args.config), RESULTS)
    place = ["--output", out, "--tag", runs.name, "--experiment", folder.name]
    if folder.exists():
        print(f"resuming an interrupted run; to start over, delete {folder.resolve()}", flush=True)
        place += ["--resume", "auto"]
    seconds = run_program("train.py", "--config", args.config, "--data-dir", digits, *place, "--device", "cpu")
    best, results, pictures = folder / "model_best.pth.tar", folder / RESULTS, folder / "predictions"
    weights = ("--checkpoint", best, "--use-ema", "--device", "cpu")
    run_program("validate.py", "--data-dir", digits, *weights, "--results-file", results, "--results-format", "json")
    run_program("predict.py", digits / "val", *weights, "--out", pictures, "--sheet-limit", "60", quiet=True)
    top1 = json.loads(results.read_text(encoding="utf-8"))["top1"]
    rows = {
        "top-1 on the held-out digits": f"{top1:.2f} %",
        "time of this training": f"{seconds:.0f} s",
        "training speed (median)": f"{_images_per_second(folder):.0f} images/s",
        "predictions": pictures / "contact_sheet.png",
        "curves": folder / "curves.png",
    }
    print_outcome(f"{_model(folder)} on handwritten digits", rows)
    if top1 < REQUIRED_TOP1:
        sys.exit(f"error: top-1 {top1:.2f} % is below {REQUIRED_TOP1} %")


def write_digits(root: Path) -> None:
    """Write the digits as ``root/{train,val}/<digit>/<number>.png``."""
    from PIL import Image
    from sklearn.datasets import load_digits

    scans = load_digits()
    for number, (pixels, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        split = "val" if number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 else "train"
        file = root / split / str(digit) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).astype("uint8"))
        image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(file)


def _model(folder: Path) -> str:
    """Return the model that a run has trained."""
    return yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))["model"]


def _images_per_second(folder: Path) -> float:
    with (folder / "summary.csv").open(newline="", encoding="utf-8") as file:
        rates = sorted(float(row["train_images_per_second"]) for row in csv.DictReader(file))
    return rates[len(rates) // 2]


if __name__ == "__main__":
    main()
