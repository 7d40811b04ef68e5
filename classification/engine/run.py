"""The folder of a training run: its settings, checkpoints and summary."""

import itertools
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mambavision.checkpoint import replacing, save_checkpoint
from mambavision.errors import OutputError, UserError

LAST, BEST, RECOVERY, SETTINGS, SUMMARY = (
    "last.pth.tar",
    "model_best.pth.tar",
    "recovery.pth.tar",
    "args.yaml",
    "summary.csv",
)


def runs_folder(output: str, tag: str) -> Path:
    """Return the folder that holds the runs of a tag."""
    return Path(output) if output else Path("output", "train", tag)


def new_run_folder(output: str, tag: str, experiment: str, model: str, size: int) -> Path:
    """Return the folder of a new run: ``output/train/TAG/DATE-TIME-MODEL-SIZE`` unless it is named."""
    parent = runs_folder(output, tag)
    if experiment:
        if (parent / experiment / LAST).exists():
            raise UserError(
                f"{parent / experiment}: holds a run already; continue it with --resume auto, or name another "
                "--experiment."
            )
        return parent / experiment
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{model.replace('/', '_')}-{size}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())


def resumable_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of all runs below a folder."""
    return [path for name in (LAST, RECOVERY, "checkpoint-*.pth.tar") for path in folder.glob(f"**/{name}")]


def require_writable(folder: Path) -> None:
    """Raise an OutputError unless a folder can be created or, if it exists, written to. Creates nothing."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(f"{folder}: cannot be written, because of {existing}; choose another folder with --output.")


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the resolved settings; the file is itself a recipe for --config."""
    with replacing(folder / SETTINGS) as file:
        file.write(yaml.safe_dump(_plain(settings), sort_keys=False).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass
class Checkpoints:
    """Which epochs are kept on disk: the last, the best, and the `keep` best ones under their number."""

    folder: Path
    keep: int
    lower_is_better: bool
    best: tuple[int, float] | None = None  # (epoch, metric)
    kept: list[tuple[int, float]] = field(default_factory=list)

    def rank(self, epoch: int, metric: float) -> bool:
        """Take note of an epoch's metric; return whether it is the best so far."""
        is_best = self.best is None or self._better(metric, self.best[1])
        if is_best:
            self.best = (epoch, metric)
        self.kept.append((epoch, metric))
        self.kept.sort(key=lambda entry: entry[1], reverse=not self.lower_is_better)
        return is_best

    def write(self, checkpoint: Mapping[str, Any], epoch: int, is_best: bool) -> None:
        """Write the checkpoint of a finished epoch; older files are removed only afterwards."""
        last = self.folder / LAST
        save_checkpoint(checkpoint, last)
        if is_best:
            _publish(last, self.folder / BEST)
        self.kept, dropped = self.kept[: self.keep], self.kept[self.keep :]
        if any(epoch == kept_epoch for kept_epoch, _ in self.kept):
            _publish(last, self._numbered(epoch))
        for dropped_epoch, _ in dropped:
            self._numbered(dropped_epoch).unlink(missing_ok=True)
        (self.folder / RECOVERY).unlink(missing_ok=True)

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "kept": list(self.kept)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best = state["best"]
        self.kept = [entry for entry in state["kept"] if self._numbered(entry[0]).exists()]

    def _better(self, metric: float, than: float) -> bool:
        return metric < than if self.lower_is_better else metric > than

    def _numbered(self, epoch: int) -> Path:
        return self.folder / f"checkpoint-{epoch}.pth.tar"


def _publish(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` (a copy where links are impossible), in one step."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}).") from error
    finally:
        temporary.unlink(missing_ok=True)
