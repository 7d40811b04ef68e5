"""The demo: train, validate and predict on handwritten digits, on the CPU, with the commands of the README.

The digits are scikit-learn's bundled scans (1797 images of 8x8 pixels from the UCI repository), written as an
ImageNet-style folder tree; every fifth image is held out.
"""

import argparse
import csv
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIRED_TOP1 = 98.0
RESULTS = "validation.json"
_HELD_OUT_EVERY = 5
_SIDE = 32  # pixels of the written pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mambavision/mambavision_digits.yaml", help="recipe to train")
    parser.add_argument("--out", default=str(HERE.parent / "output" / "demo"), help="folder to write to")
    args = parser.parse_args()
    os.chdir(HERE)
    if not Path(args.config).is_file():
        parser.error(f"--config {args.config}: no such file in {HERE}")
    out = Path(os.path.relpath(args.out))
    digits, runs = out / "digits", out / "runs"
    write_digits(digits)

    signal.signal(signal.SIGINT, lambda *_: None)  # the programs receive Ctrl-C too, and say how far they came
    folder = run_folder(runs, Path(args.config))
    place = ["--output", out, "--tag", runs.name, "--experiment", folder.name]
    if folder.exists():
        print(f"going on with an interrupted run; to start anew, delete {folder.resolve()}", flush=True)
        place += ["--resume", "auto"]
    seconds = _run("train.py", "--config", args.config, "--data-dir", digits, *place, "--device", "cpu")
    best, results, pictures = folder / "model_best.pth.tar", folder / RESULTS, folder / "predictions"
    weights = ("--checkpoint", best, "--use-ema", "--device", "cpu")
    _run("validate.py", "--data-dir", digits, *weights, "--results-file", results, "--results-format", "json")
    _run("predict.py", digits / "val", *weights, "--out", pictures, "--sheet-limit", "60", quiet=True)
    top1 = json.loads(results.read_text())["top1"]
    _print_outcome(top1, seconds, _images_per_second(folder), [pictures / "contact_sheet.png", folder / "curves.png"])
    if top1 < REQUIRED_TOP1:
        sys.exit(f"error: top-1 {top1:.2f} % is below {REQUIRED_TOP1} %")


def run_folder(runs: Path, config: Path) -> Path:
    """Return the folder of an interrupted run of the same recipe, or else of a new run."""
    recipe = hashlib.sha256(config.read_bytes()).hexdigest()[:8]
    interrupted = [folder for folder in runs.glob(f"*-{recipe}") if not (folder / RESULTS).exists()]
    return max(interrupted, default=runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe}")


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


def _run(program: str, *arguments: str | Path, quiet: bool = False) -> float:
    """Run a program of this folder, and return the seconds it took."""
    command = ["python", program, *map(str, arguments)]
    print(f"\n$ cd classification; {shlex.join(command)}", flush=True)
    started = time.monotonic()
    status = subprocess.run([sys.executable, *command[1:]], stdout=subprocess.DEVNULL if quiet else None).returncode
    if status in (130, 143):
        print("interrupted; start the demo again, and it goes on from there", file=sys.stderr)
    if status:
        sys.exit(status)
    return time.monotonic() - started


def _images_per_second(folder: Path) -> float:
    with (folder / "summary.csv").open(newline="") as file:
        rates = sorted(float(row["train_images_per_second"]) for row in csv.DictReader(file))
    return rates[len(rates) // 2]


def _print_outcome(top1: float, seconds: float, rate: float, pictures: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="MambaVision on handwritten digits", show_header=False, title_justify="left")
    table.add_row("top-1 on the held-out digits", f"{top1:.2f} %")
    table.add_row("time of this training", f"{seconds:.0f} s")
    table.add_row("training speed (median)", f"{rate:.0f} images/s")
    for picture in pictures:
        table.add_row("picture", str(picture.resolve()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if sys.prefix != sys.base_prefix:
        print(f"\nFor the other commands of the README: source {Path(sys.prefix) / 'bin' / 'activate'}")


if __name__ == "__main__":
    main()
