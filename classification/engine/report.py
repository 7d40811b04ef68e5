"""Metric reporting of a run: TensorBoard, Weights & Biases, summary table and curves."""

import csv
import io
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.run_folder import SUMMARY
from mambavision.errors import UserError
from mambavision.files import replacing
from mambavision.running.logs import line_format, tolerate_write_errors

CURVES = "curves.png"
_CURVES_EVERY_SECONDS = 60.0


class RunReport:
    """Writes the metrics of every epoch to the run's folder.

    Args:
        folder: Folder of the run.
        log_dir: Folder of the TensorBoard files.
        first_epoch: First epoch of this start; later entries of an earlier start are discarded.
        settings: Settings of the run.
        use_wandb: Log to Weights & Biases as well.
    """

    def __init__(
        self, folder: Path, log_dir: Path, first_epoch: int, settings: Mapping[str, Any], use_wandb: bool
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.folder = folder
        self._writer = SummaryWriter(str(log_dir), purge_step=first_epoch)
        self._wandb = _start_wandb(folder, settings) if use_wandb else None
        self._curves_drawn = time.monotonic()
        self._log_file = logging.FileHandler(folder / "train.log", encoding="utf-8")
        self._log_file.setFormatter(line_format())
        tolerate_write_errors(self._log_file)
        logging.getLogger().addHandler(self._log_file)

    def epoch(
        self,
        epoch: int,
        train: Mapping[str, float],
        validation: Mapping[str, float],
        averaged: Mapping[str, float] | None,
        lr: float,
    ) -> None:
        """Record an epoch that is already in the summary."""
        scalars = {
            "perf/test_acc1": validation["top1"],
            "perf/test_loss": validation["loss"],
            "perf/train_loss": train["loss"],
            "perf/lr": lr,
        }
        if averaged:
            scalars |= {"perf/test_acc1_ema": averaged["top1"], "perf/test_loss_ema": averaged["loss"]}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()
        if self._wandb is not None:
            self._wandb.log({"epoch": epoch, **scalars})
        if time.monotonic() - self._curves_drawn > _CURVES_EVERY_SECONDS:
            self.draw_curves()

    def draw_curves(self) -> None:
        """Draw the curves of all epochs so far."""
        draw_curves(self.folder / SUMMARY, self.folder / CURVES)
        self._curves_drawn = time.monotonic()

    def close(self) -> None:
        """Draw the final curves and close all files."""
        if read_summary(self.folder):
            self.draw_curves()
        logging.getLogger().removeHandler(self._log_file)
        self._log_file.close()
        self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def summary_row(
    epoch: int, train: Mapping[str, float], validation: Mapping[str, float], lr: float
) -> dict[str, float | str]:
    """Return the summary row of an epoch, with timm's columns."""
    row: dict[str, float | str] = {"epoch": epoch}
    row |= {f"train_{key}": value for key, value in train.items()}
    row |= {f"eval_{key}": value for key, value in validation.items()}
    return row | {"lr": lr}


def write_summary(folder: Path, rows: Sequence[Mapping[str, float | str]]) -> None:
    """Write the summary of all epochs so far, ``summary.csv``."""
    columns = dict.fromkeys(name for row in rows for name in row)
    table = io.StringIO()
    writer = csv.DictWriter(table, columns)
    if rows:
        writer.writeheader()
    writer.writerows(rows)
    with replacing(folder / SUMMARY) as file:
        file.write(table.getvalue().encode())


def write_missing(folder: Path, rows: Sequence[Mapping[str, float | str]]) -> None:
    """Write the summary and curves if they are missing because the run was killed after its last checkpoint."""
    if len(read_summary(folder)) < len(rows):
        write_summary(folder, rows)
    if rows and not (folder / CURVES).exists():
        draw_curves(folder / SUMMARY, folder / CURVES)


def read_summary(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's summary."""
    try:
        with (folder / SUMMARY).open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if (row.get("epoch") or "").isdecimal()]
    except FileNotFoundError:
        return []


def _start_wandb(folder: Path, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--log-wandb needs the package wandb: pip install wandb.") from None
    return wandb.init(project="mamba-vision-backbones", name=folder.name, dir=str(folder), config=dict(settings))


def draw_curves(summary: Path, picture: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs of a summary."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import MaxNLocator

    rows = read_summary(summary.parent)
    epochs = [int(row["epoch"]) for row in rows]
    panels = [
        ("loss", {"training": "train_loss", "validation": "eval_loss"}),
        ("accuracy (%)", {"top-1": "eval_top1", "top-5": "eval_top5"}),
        ("learning rate", {"": "lr"}),
    ]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (label, curves) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name, column in curves.items():
            axes.plot(epochs, [float(row[column]) for row in rows], label=name, marker="." if len(rows) < 40 else "")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    best = max(rows, key=lambda row: float(row["eval_top1"]))
    figure.suptitle(f"{summary.parent.name}: best top-1 {float(best['eval_top1']):.2f} % in epoch {best['epoch']}")
    with replacing(picture) as file:
        figure.savefig(file, format="png", dpi=100)
