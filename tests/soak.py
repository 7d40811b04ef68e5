"""A long training of a small model: what it holds in memory and open files must not grow.

    python tests/soak.py [--steps 5000]

Prints memory, open files and leftover workers, and ends with status 1 if they are more than they may be.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

TESTS = Path(__file__).resolve().parent
EPOCH_STEPS = 20
WARM_UP = 0.2  # of the steps
MAY_GROW = 0.05
CLASSES, BATCH = 2, 4

TRAINING = [
    "--model", "mamba_vision_T", "--model-kwargs", "dim=8", "in_dim=4", "depths=(1,1,1,1)", "num_heads=(1,1,1,1)",
    "window_size=(8,8,2,1)", "--input-size", "3", "32", "32", "--device", "cpu", "--batch-size", str(BATCH),
    "--workers", "2", "--warmup-epochs", "1", "--cooldown-epochs", "0", "--model-ema", "--recovery-interval", "7",
    "--epochs", "1000000", "--checkpoint-hist", "1", "--log-interval", str(EPOCH_STEPS), "--experiment", "soak",
]  # fmt: skip


def write_images(root: Path) -> None:
    for split, count in {"train": EPOCH_STEPS * BATCH // CLASSES, "val": BATCH}.items():
        for label in range(CLASSES):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (number % 256, 255 * label, 0)).save(folder / f"{number}.png")


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def measure(program: subprocess.Popen) -> tuple[int, int]:
    """Return resident bytes and open files of a program and its workers."""
    processes = [program.pid, *children(program.pid)]
    return sum(map(resident_bytes, processes)), sum(map(open_files, processes))


def follow(program: subprocess.Popen, steps: int) -> list[tuple[int, int]]:
    """Measure after every epoch until so many steps are done."""
    measured = []
    for line in program.stdout:
        if f"[{EPOCH_STEPS}/{EPOCH_STEPS}]" in line:
            measured.append(measure(program))
            if len(measured) * EPOCH_STEPS >= steps:
                return measured
    raise SystemExit(f"the training ended by itself with status {program.wait()}")


def is_alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def interrupt(program: subprocess.Popen) -> list[int]:
    """Press Ctrl-C; return the workers that outlive the program by ten seconds."""
    workers = children(program.pid)
    os.killpg(program.pid, signal.SIGINT)
    program.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [worker for worker in workers if is_alive(worker)]


def median(values: list[int]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps to watch")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder, "data"))
        program = subprocess.Popen(
            [sys.executable, "-u", str(TESTS.parent / "classification/train.py"), *TRAINING, "--data-dir", "data"],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            measured = follow(program, args.steps)
            orphans = interrupt(program)
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
    settled = measured[int(WARM_UP * len(measured)) :]
    part = max(1, len(settled) // 10)
    before, after = (median([size for size, _ in some]) for some in (settled[:part], settled[-part:]))
    growth = after / before - 1
    files = [count for _, count in settled]
    print(f"{len(measured) * EPOCH_STEPS} steps, the first {WARM_UP:.0%} to warm up")
    print(f"memory: {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB: {growth:+.2%} (at most {MAY_GROW:+.0%})")
    print(f"open files: {min(files[:part])} to {max(files[:part])}, then {min(files[-part:])} to {max(files[-part:])}")
    print(f"workers left after Ctrl-C: {len(orphans)}; status of the program: {program.returncode}")
    has_leak = min(files[-part:]) > max(files[:part])  # batches on their way from the workers are files, too
    return int(growth > MAY_GROW or has_leak or bool(orphans) or program.returncode != 130)


if __name__ == "__main__":
    sys.exit(main())
