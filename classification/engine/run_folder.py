"""The folder of a training run: settings, checkpoints and summary."""

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.options import TrainOptions
from mambavision.checkpoint import read_outline, save_checkpoint
from mambavision.errors import UserError
from mambavision.files import link, replacing
from mambavision.running.folder_lock import FolderLock
from mambavision.running.newest import Position, position

LAST, BEST, RECOVERY, SETTINGS, SUMMARY = (
    "last.pth.tar",
    "model_best.pth.tar",
    "recovery.pth.tar",
    "args.yaml",
    "summary.csv",
)
_NUMBERED = "checkpoint-"


def runs_folder(output: str, tag: str) -> Path:
    """Return the folder with the runs of a tag: ``output/train/TAG``, or ``OUTPUT/TAG`` if `output` is not empty."""
    return Path(output or Path("output", "train"), tag)


def new_run_folder(output: str, tag: str, experiment: str, model: str, size: int) -> Path:
    """Return the folder of a new run: ``output/train/TAG/DATE-TIME-MODEL-SIZE``, or that of the experiment."""
    parent = runs_folder(output, tag)
    if experiment:
        if checkpoints_in(parent / experiment):
            raise UserError(
                f"{parent / experiment}: already contains a run; resume it with --resume auto, or give another "
                "--experiment."
            )
        return parent / experiment
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{model.replace('/', '_')}-{size}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())


def claim_new_folder(
    lock: FolderLock, output: str, tag: str, experiment: str, model: str, size: int, patience: float = 0.0
) -> Path:
    """Return the folder of a new run as `new_run_folder` does, and lock it for this run.

    Raises:
        UserError: The experiment already has checkpoints, or is being trained.
    """
    advice = "or give another --experiment"
    if experiment:
        lock.acquire(runs_folder(output, tag) / experiment, advice, patience=patience)
        return new_run_folder(output, tag, experiment, model, size)
    while True:
        folder = new_run_folder(output, tag, experiment, model, size)
        try:
            lock.acquire(folder, advice, new=True)
        except FileExistsError:  # created by a run that was started in the same second
            continue
        return folder


def run_folders(output: str, tag: str, experiment: str) -> list[Path]:
    """Return the folder of an experiment or, without a name of one, those of all runs of a tag."""
    parent = runs_folder(output, tag)
    return [parent / experiment] if experiment else list(parent.glob("*/"))


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoint files of a run, except the copy of the best one."""
    return [path for name in (LAST, RECOVERY, f"{_NUMBERED}*.pth.tar") for path in folder.glob(name)]


def positions_in(folder: Path) -> list[Position]:
    """Return the positions of the checkpoints of a run."""
    return [position(outline) for path in checkpoints_in(folder) if (outline := read_outline(path)) is not None]


def position_of(folder: Path) -> Position:
    """Return the position of the newest checkpoint of a run; empty without checkpoints."""
    numbered = folder.glob(f"{_NUMBERED}*.pth.tar")
    for paths in ([folder / LAST, folder / RECOVERY], numbered):  # numbered ones are never newer than these two
        if known := [position(outline) for path in paths if (outline := read_outline(path)) is not None]:
            return max(known)
    return ()


def folder_of(checkpoint: Path) -> Path | None:
    """Return the run folder that contains a checkpoint, or None if it is elsewhere."""
    return checkpoint.parent if (checkpoint.parent / SETTINGS).exists() else None


def settings_of(options: TrainOptions) -> dict[str, Any]:
    """Return the options that define a run, in YAML's types."""
    # Not the source of the options, how the run was started, or options for the command line only.
    excluded = ("config", "local_rank", "resume", "trust_checkpoint")
    return _plain({key: value for key, value in options.flat().items() if key not in excluded})


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run; the file can be used as a recipe for --config."""
    with replacing(folder / SETTINGS) as file:
        file.write(yaml.safe_dump(settings, sort_keys=False).encode())


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of a run, or None if they are missing or unreadable."""
    try:
        return yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass
class Checkpoints:
    """Checkpoint files of a run: of the last epoch, of the best, and of the `keep` best ones by number."""

    folder: Path
    keep: int
    lower_is_better: bool
    best: tuple[int, float] | None = None  # (epoch, metric)
    kept: list[tuple[int, float]] = field(default_factory=list)

    def rank(self, epoch: int, metric: float) -> bool:
        """Record the metric of an epoch; return True if it is the best so far."""
        is_best = self.best is None or self._merit(metric) > self._merit(self.best[1])
        if is_best:
            self.best = (epoch, metric)
        others = [entry for entry in self.kept if entry[0] != epoch]  # --start-epoch can repeat an epoch
        self.kept = sorted([*others, (epoch, metric)], key=lambda entry: self._merit(entry[1]), reverse=True)
        return is_best

    def write(self, checkpoint: Mapping[str, Any], epoch: int, is_best: bool) -> None:
        """Write the checkpoint of a complete epoch, then remove older files.

        ``last.pth.tar`` is written last, because it refers to the best epoch, whose weights must exist.
        """
        self.kept, dropped = self.kept[: self.keep], self.kept[self.keep :]
        is_kept = any(epoch == kept_epoch for kept_epoch, _ in self.kept)
        wanted = {self.folder / BEST: is_best, self._numbered(epoch): is_kept, self.folder / LAST: True}
        first, *others = (path for path, is_wanted in wanted.items() if is_wanted)
        save_checkpoint(checkpoint, first)
        for path in others:
            link(first, path)
        for dropped_epoch, _ in dropped:
            self._numbered(dropped_epoch).unlink(missing_ok=True)
        (self.folder / RECOVERY).unlink(missing_ok=True)

    def state(self) -> dict[str, Any]:
        """Return the ranking, for a checkpoint."""
        return {"best": self.best, "kept": list(self.kept)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the ranking that `state` returned, without files that no longer exist."""
        self.best = state["best"]
        self.kept = [entry for entry in state["kept"] if self._numbered(entry[0]).exists()]

    def _merit(self, metric: float) -> float:
        """Return a number that is higher for better metrics; non-finite metrics rank last."""
        if not math.isfinite(metric):
            return -math.inf
        return -metric if self.lower_is_better else metric

    def _numbered(self, epoch: int) -> Path:
        return self.folder / f"{_NUMBERED}{epoch}.pth.tar"
