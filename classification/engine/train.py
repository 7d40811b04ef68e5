"""The training loop."""

import logging
import time
from collections import OrderedDict
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import distribute_bn, random_seed, unwrap_model
from torch import Tensor
from torch.utils.data import IterableDataset

from engine import report, resume, run_folder
from engine.batches import build_batches
from engine.checks import check_options
from engine.data import check_same_classes, log_skipped, open_training_data
from engine.evaluate import evaluate
from engine.learner import Learner
from engine.model import build_model, channels_of, data_config, model_arguments, placed
from engine.objective import MesaTask
from engine.options import TrainOptions
from mambavision.checkpoint import save_checkpoint
from mambavision.errors import Interruption, NonFiniteError, Preempted
from mambavision.files import check_writable, remove_temporaries
from mambavision.running.finite import FiniteGuard
from mambavision.running.folder_lock import FolderLock
from mambavision.running.group import Group
from mambavision.running.logs import start_logging
from mambavision.running.newest import new_start_number
from mambavision.running.process import pick_device, this_process
from mambavision.running.progress import ProgressLine, duration, progress
from mambavision.running.random_state import random_state, set_random_state
from mambavision.running.record import NEVER, begin, finish
from mambavision.running.signals import StopRequested, StopSignals, end_preempted
from mambavision.running.slurm import lock_patience

_logger = logging.getLogger(__name__)

_NO_BATCH = {"loss_sum": 0.0, "images": 0}


def train(options: TrainOptions) -> None:
    """Train, or only evaluate with --validate-only."""
    process = this_process()
    group = Group(process, pick_device(options.run.device, process))
    start_logging(group.is_first)
    check_options(options, group)
    group.join()
    with StopSignals() as signals:
        if options.run.validate_only:
            Trainer(options, group, signals).validate_only()
        else:
            with FolderLock() as lock:
                Trainer(options, group, signals, lock).fit()
    group.leave()


class Trainer:
    """A training run, as seen by one process. Nothing is written until everything is built.

    Args:
        options: Options of train.py.
        group: All processes.
        signals: Requests to stop.
        lock: Locks the run's folder, on the first process. Without it, nothing may be written.
    """

    def __init__(
        self, options: TrainOptions, group: Group, signals: StopSignals, lock: FolderLock | None = None
    ) -> None:
        self.options, self.group, self.signals, self.lock = options, group, signals, lock
        run = options.run
        check_writable(run_folder.runs_folder(run.output, run.tag) / run.experiment / run_folder.SETTINGS)
        self.log_dir = Path(f"{run.log_dir.rstrip('/')}_{run.tag}") if run.log_dir else None
        if self.log_dir:
            check_writable(self.log_dir / run_folder.SETTINGS)
        random_seed(run.seed)  # the same on all processes, so that they build the same model
        if run.deterministic:
            torch.use_deterministic_algorithms(True)

        batch_sizes = (options.model.batch_size, options.model.validation_batch_size or options.model.batch_size)
        train_data, validation_data, self.classes = open_training_data(
            options.data, batch_sizes, channels_of(options.model) or 3, run.seed
        )
        self.datasets = (train_data, validation_data)
        resumed = resume.find(options, group, lock)
        if resumed:
            check_same_classes(resumed.checkpoint.get("classes"), self.classes, "the checkpoint", "the data")
        self.model_arguments = model_arguments(options.model, self.classes)
        splits = options.augmentation.aug_splits
        model = build_model(options.model, options.averaging, self.model_arguments, splits)
        self.memory_format = torch.channels_last if options.model.channels_last else torch.contiguous_format
        model = placed(model, group.device, options.model.channels_last)
        self.data_config = data_config(model, vars(options.model))
        self.batches = build_batches(options, self.data_config, model.num_classes, train_data, validation_data, group)
        self.learner = Learner(options, group, model, len(self.batches.train), resumed)
        self.num_epochs = self.learner.num_epochs
        self.first_epoch, self.first_batch = options.schedule.start_epoch or 0, 0
        self.epoch_so_far = dict(_NO_BATCH)  # of this process
        random_seed(run.seed, group.rank)
        own_folder = resumed.folder if resumed else None
        self.is_new = own_folder is None
        self.folder: Path = own_folder or self._new_folder()
        self.checkpoints = run_folder.Checkpoints(self.folder, run.checkpoint_hist, run.eval_metric == "loss")
        self.start = new_start_number(run_folder.positions_in(self.folder) if group.is_first else ())
        if resumed:
            self._find_position(resumed)
        self.rows = self._rows_before(resumed)
        self.last_complete_epoch = self.first_epoch - 1
        updates = self.first_epoch * self._steps(len(self.batches.train)) + self._steps(self.first_batch)
        self.learner.go_to(self.first_epoch, updates, resumed)
        self.learner.distribute()
        if resumed:
            self._restore_own_state(resumed)
        self.guard = FiniteGuard(group)
        self.position = (self.first_epoch, self.first_batch)  # epoch and batch, for messages

    # Set-up

    def _new_folder(self) -> Path:
        run = self.options.run
        size = (self.options.model.input_size or self.data_config["input_size"])[-1]
        words = (run.output, run.tag, run.experiment, self.options.model.model, size)
        if self.lock is None:
            return self.group.call_on_first(partial(run_folder.new_run_folder, *words))
        return self.group.call_on_first(partial(run_folder.claim_new_folder, self.lock, *words, lock_patience()))

    def _find_position(self, resumed: resume.Resumed) -> None:
        is_stream = isinstance(self.datasets[0], IterableDataset)
        self.first_epoch, self.first_batch = resumed.position(self._batching(), is_stream)
        if "checkpoints" in resumed.checkpoint:
            self.checkpoints.load_state(resumed.checkpoint["checkpoints"])

    def _rows_before(self, resumed: resume.Resumed | None) -> list[dict[str, Any]]:
        """Return the summary rows of the epochs before the first one; the checkpoint contains all of them."""
        if resumed is None:
            return []
        rows = resumed.checkpoint.get("summary")
        if not isinstance(rows, list):  # of an earlier version
            rows = report.read_summary(self.folder)
        return [row for row in rows if int(row["epoch"]) < self.first_epoch]

    def _restore_own_state(self, resumed: resume.Resumed) -> None:
        """Restore the state of this process; last, because DDP broadcasts the buffers of rank 0 on wrapping."""
        states = resumed.checkpoint.get("processes", [])
        if len(states) == self.group.size:
            own = states[self.group.rank]
            set_random_state(own["random"])
            self.learner.load_buffers(own["buffers"])
            if self.first_batch:
                self.epoch_so_far = own["epoch_so_far"]
        elif states:
            _logger.warning(
                "the run had %d processes and now has %d: its random numbers differ from here on",
                len(states),
                self.group.size,
            )

    def _batching(self) -> dict[str, float]:
        """Return the settings that decide which images are in a batch, and when the optimizer steps."""
        options = self.options
        return {
            "batch_size": options.model.batch_size,
            "grad_accum_steps": options.optimizer.grad_accum_steps,
            "seed": options.run.seed,
            "epoch_repeats": options.data.epoch_repeats,
            "aug_repeats": options.augmentation.aug_repeats,
            "images": len(self.datasets[0]),
            "processes": self.group.size,
        }

    def _steps(self, batches: int) -> int:
        """Return the number of optimizer steps in the first batches of an epoch."""
        return -(-batches // self.options.optimizer.grad_accum_steps)

    # Running

    def fit(self) -> None:
        """Train to the last epoch."""
        if self.first_epoch < self.num_epochs:
            self._fit()
        else:
            _logger.info("all %d epochs of this run are complete; raise --epochs to continue", self.num_epochs)
            if self.group.is_first and not self.is_new:
                remove_temporaries(self.folder)
                report.write_missing(self.folder, self.rows)
        if self.group.is_first:
            finish(self.folder)

    def _fit(self) -> None:
        reporter, epoch = self._open_report(), self.first_epoch
        try:
            with closing(reporter) if reporter else nullcontext():
                for epoch in range(self.first_epoch, self.num_epochs):
                    self._run_epoch(epoch, reporter)
        except Interruption as interruption:
            interruption.advice = f" in epoch {epoch}{interruption.advice or '; ' + self._how_to_resume()}"
            raise
        for dataset in self.datasets:
            log_skipped(dataset)
        if self.checkpoints.best is not None:
            epoch, metric = self.checkpoints.best
            name = self.options.run.eval_metric
            _logger.info("best %s %.3f in epoch %d; all results are in %s", name, metric, epoch, self.folder)

    def _how_to_resume(self) -> str:
        if not run_folder.checkpoints_in(self.folder):
            return "no checkpoint was written yet"
        done = "none" if self.last_complete_epoch < 0 else self.last_complete_epoch
        return f"resume with --resume auto (last complete epoch: {done})"

    def validate_only(self) -> None:
        """Score the initial or resumed weights."""
        for name, scores in self._scores().items():
            figures = scores["top1"], scores["top5"], scores["loss"]
            _logger.info("%s: top-1 %.3f %%, top-5 %.3f %%, loss %.4f", name, *figures)

    def _open_report(self) -> report.RunReport | None:
        if not self.group.is_first:
            return None
        options = self.options
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.folder)
        if self.is_new and options.model.resume == NEVER:
            resume.forget_preempted(options, self.folder)
        settings = run_folder.settings_of(options)
        run_folder.write_settings(self.folder, settings)
        begin(self.folder, options.model.resume, self.is_new, start_number=self.start)
        log_dir = self.log_dir or self.folder / "tensorboard"
        reporter = report.RunReport(self.folder, log_dir, self.first_epoch, settings, options.run.log_wandb)
        report.write_summary(self.folder, self.rows)
        parameters = sum(parameter.numel() for parameter in self.learner.parameters())
        _logger.info(
            "%s: %.1f M parameters on %s x %d, %d epochs of %d batches of %d; writing to %s",
            options.model.model,
            parameters / 1e6,
            self.group.device,
            self.group.size,
            self.num_epochs,
            len(self.batches.train),
            options.model.batch_size * self.group.size,
            self.folder,
        )
        warmup, epochs = options.schedule.warmup_epochs, options.schedule.epochs
        if warmup >= epochs:
            _logger.warning(
                "the learning rate never leaves its warm-up: --warmup-epochs is %d, and --epochs only %d",
                warmup,
                epochs,
            )
        return reporter

    def _run_epoch(self, epoch: int, reporter: report.RunReport | None) -> None:
        started, metric = time.monotonic(), self.options.run.eval_metric
        self._prepare_epoch(epoch)
        train_loss, images_per_second = self._train_epoch(epoch)
        statistics = self.options.averaging.dist_bn
        if self.group.is_distributed and statistics:
            for model in self.learner.models_on_device().values():
                distribute_bn(unwrap_model(model), self.group.size, statistics == "reduce")

        try:
            scores = self._scores()
        except StopRequested:
            self._stop(epoch, len(self.batches.train))
        judged = scores.get("averaged", scores["raw"])
        lr = self.learner.lr
        self.learner.scheduler.step(epoch + 1, judged[metric])
        is_best = self.checkpoints.rank(epoch, judged[metric])
        training = {"loss": train_loss, "images_per_second": round(images_per_second, 1)}
        self.rows.append(report.summary_row(epoch, training, judged, lr))
        if not self.options.run.no_saver:  # includes the row, so that no kill can lose it
            self._save(epoch, is_best=is_best)
        if reporter is not None:
            self._check_folder()
            report.write_summary(self.folder, self.rows)
            reporter.epoch(epoch, training, scores["raw"], scores.get("averaged"), lr)
        assert self.checkpoints.best is not None  # after `rank`
        best_epoch, best = self.checkpoints.best
        remaining = (time.monotonic() - started) * (self.num_epochs - 1 - epoch)
        _logger.info(
            "epoch %d: training loss %.4f, validation loss %.4f, top-1 %.2f %%, top-5 %.2f %%, lr %.3g, %.1f images/s "
            "(best %s %.3f in epoch %d), ETA of the run %s",
            epoch, train_loss, judged["loss"], judged["top1"], judged["top5"], lr, images_per_second,
            metric, best, best_epoch, duration(remaining),
        )  # fmt: skip

    def _prepare_epoch(self, epoch: int) -> None:
        """Disable mixup and enable self-distillation once their epochs are reached."""
        mixup_off, averaging = self.options.augmentation.mixup_off_epoch, self.options.averaging
        if mixup_off and epoch >= mixup_off:
            self.batches.train.stop_mixup()
            if self.batches.mixup is not None:
                self.batches.mixup.mixup_enabled = False
        if isinstance(self.learner.task, MesaTask):
            self.learner.task.distilling = epoch / self.options.schedule.epochs > averaging.mesa_start_ratio

    def _scores(self) -> dict[str, dict[str, float]]:
        scores = {}
        for name, model in self.learner.models_on_device().items():
            title = "validation" if name == "raw" else "validation (averaged)"
            total = len(self.batches.validation)
            interval = self.options.run.log_interval
            with progress(title, total, interval, self.group.is_first, log_end=False) as line:
                scores[name] = evaluate(
                    unwrap_model(model),
                    self.batches.validation,
                    self.group.device,
                    autocast=self.learner.autocast,
                    memory_format=self.memory_format,
                    distributed=self.group.is_distributed,
                    on_batch=partial(self._after_validation_batch, line),
                )
        return scores

    def _after_validation_batch(self, line: ProgressLine, batch: int, images: int) -> None:
        line.step()
        # With a stream, processes may have different numbers of batches, and cannot communicate after each of them.
        can_ask = not self.group.is_distributed or not isinstance(self.datasets[1], IterableDataset)
        if can_ask:
            self.signals.raise_if_received(self.group)

    def _train_epoch(self, epoch: int) -> tuple[float, float]:
        """Return the mean loss over the images of the epoch, and the images per second."""
        run, total, task = self.options.run, len(self.batches.train), self.learner.task
        accumulated, device = self.options.optimizer.grad_accum_steps, self.group.device
        first_batch, self.first_batch = self.first_batch, 0
        if not first_batch:
            self.epoch_so_far = dict(_NO_BATCH)
        so_far = [self.epoch_so_far["loss_sum"], self.epoch_so_far["images"]]
        total_loss = torch.tensor(so_far, dtype=torch.float64, device=device)
        images_here, started, rate = 0, time.monotonic(), 0.0
        task.train()
        self.learner.optimizer.zero_grad()
        with progress(f"epoch {epoch}", total, run.log_interval, self.group.is_first, first_batch) as line:
            for batch, (images, targets) in enumerate(self.batches.train.epoch(epoch, first_batch), first_batch):
                self.position = (epoch, batch)
                images = images.to(device, non_blocking=True, memory_format=self.memory_format)
                targets = targets.to(device, non_blocking=True)
                if self.batches.mixup is not None:
                    images, targets = self.batches.mixup(images, targets)
                is_step = (batch + 1) % accumulated == 0 or batch + 1 == total
                with nullcontext() if is_step else task.no_sync():
                    with self.learner.autocast():
                        loss = task(images, targets)["loss"]
                    total_loss += _loss_and_images(loss, len(images))
                    self.guard.note(loss, partial(self.batches.train.sample_names, epoch, batch))
                    self.learner.backward(loss / self._group_size(batch, total))
                images_here += len(images)
                is_asked = is_step and self._finish_step()
                rate = images_here * self.group.size / (time.monotonic() - started)
                is_logged = line.step(partial(self._progress_text, total_loss, rate))
                if is_logged and run.save_images:
                    self._save_images(images, epoch, batch)
                if is_step:
                    self._save_within_epoch(epoch, batch + 1, total_loss, is_asked)
        self._note_so_far(total_loss)
        return self.group.mean(total_loss[0] / total_loss[1]), rate

    def _note_so_far(self, total_loss: Tensor) -> None:
        loss_sum, images = total_loss.tolist()
        self.epoch_so_far = {"loss_sum": loss_sum, "images": int(images)}

    def _progress_text(self, total_loss: Tensor, rate: float) -> str:
        return f"loss {(total_loss[0] / total_loss[1]).item():.4f}  lr {self.learner.lr:.3g}  {rate:.1f} images/s"

    def _group_size(self, batch: int, total: int) -> int:
        """Return the number of batches that share the optimizer step of this one; fewer at the end of an epoch."""
        size = self.options.optimizer.grad_accum_steps
        return min(size, total - batch // size * size)

    def _finish_step(self) -> bool:
        """Take the optimizer step if loss and gradients are finite; return True if any process was asked to stop."""
        try:
            has_scale = self.learner.scaler.is_enabled()
            is_asked = self.guard.check(self.learner.gradients(), self.signals.received, has_scale)
            self.guard.count_skip(self.learner.step())
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} {self._about_the_step()}") from None
        return is_asked

    def _about_the_step(self) -> str:
        """Describe the step that was not taken, for the error message."""
        epoch, batch = self.position
        files = [self.folder / name for name in (run_folder.RECOVERY, run_folder.LAST) if (self.folder / name).exists()]
        kept = f"{files[0]} is untouched" if files else "no checkpoint was written yet"
        return (
            f"It was epoch {epoch}, batch {batch}, at learning rate {self.learner.lr:.3g} ({kept}). Lower --lr, "
            "lengthen --warmup-epochs, or use --bfloat instead of float16."
        )

    # Saving

    def _save_within_epoch(self, epoch: int, next_batch: int, total_loss: Tensor, is_asked: bool) -> None:
        """Save within an epoch if it is due; stop if asked to."""
        run = self.options.run
        is_due = run.recovery_interval and self.learner.updates % run.recovery_interval == 0
        is_due = is_due and not run.no_saver and next_batch < len(self.batches.train)
        if is_asked or is_due:
            self._note_so_far(total_loss)
        if is_asked:
            self._stop(epoch, next_batch)
        if is_due:
            self._save(epoch, next_batch=next_batch)

    def _stop(self, epoch: int, next_batch: int) -> NoReturn:
        if self.options.run.no_saver:
            self.group.leave()
            raise Preempted("; --no-saver: nothing was saved, and the run would start over")
        self._save(epoch, next_batch=next_batch)
        end_preempted(self.group, self.folder, "; the same command resumes the run")

    def _save(self, epoch: int, *, is_best: bool = False, next_batch: int | None = None) -> None:
        checkpoint = self._state(epoch, next_batch)  # collective
        if not self.group.is_first:
            return
        self._check_folder()
        if next_batch is None:
            self.checkpoints.write(checkpoint, epoch, is_best)
            self.last_complete_epoch = epoch
        else:
            save_checkpoint(checkpoint, self.folder / run_folder.RECOVERY)

    def _check_folder(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _state(self, epoch: int, next_batch: int | None) -> OrderedDict[str, Any]:
        """Return everything that is needed to resume the run and to use the model, in types that load safely."""
        own = {
            "random": random_state(),
            "buffers": self.learner.buffers(),
            "epoch_so_far": self.epoch_so_far,
        }
        state = OrderedDict(
            epoch=epoch,
            next_batch=next_batch,  # None: the epoch is complete
            started=self.start,
            summary=self.rows,
            batching=self._batching(),
            arch=self.options.model.model,
            model_kwargs=self.model_arguments,
            data_config=self.data_config,
            exif_transpose=self.options.data.exif_transpose,
            classes=self.classes,
            version=2,
            **self.learner.state(),
            args=self.options.flat(),
            checkpoints=self.checkpoints.state(),
            processes=self.group.gather(own),
        )
        if self.checkpoints.best is not None:
            state["metric"] = self.checkpoints.best[1]
        return state

    def _save_images(self, images: Tensor, epoch: int, batch: int) -> None:
        from torchvision.utils import save_image

        save_image(images, self.folder / f"train-epoch{epoch}-batch{batch}.jpg", padding=0, normalize=True)


def _loss_and_images(loss: Tensor, images: int) -> Tensor:
    """Return the summed loss and the number of images of a batch; zeros if the loss is not finite."""
    loss = loss.detach().double()
    sums = torch.stack((loss * images, torch.full_like(loss, images)))
    return sums.where(loss.isfinite(), 0.0)
