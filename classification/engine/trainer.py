"""The training loop."""

import argparse
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

from engine import build, report, resuming, run, sharding
from engine.data import check_same_classes, log_skipped
from engine.evaluate import evaluate
from engine.learner import Learner
from engine.loaders import Share
from engine.values import check_values
from mambavision import resume
from mambavision.checkpoint import save_checkpoint
from mambavision.errors import Interruption
from mambavision.exchange import by_first, mean, of_all
from mambavision.files import check_writable, remove_temporaries
from mambavision.finite import FiniteGuard, NonFiniteError
from mambavision.launch import Process, join, leave, pick_device, this_process
from mambavision.locking import FolderLock
from mambavision.preemption import (
    NEVER,
    AskedToLeaveError,
    Preempted,
    StopSignals,
    begin,
    finish,
    leave_preempted,
    patience,
)
from mambavision.ranges import check_ranges
from mambavision.reporting import start_logging

_logger = logging.getLogger(__name__)

_NO_BATCH = {"loss_sum": 0.0, "images": 0}


def train(args: argparse.Namespace) -> None:
    """Train, or only evaluate with --validate-only."""
    check_ranges(args)
    process = this_process()
    device = pick_device(args.device, process)
    start_logging(process.is_first)
    build.check_options(args, device)
    sharding.check_options(args, process)
    check_values(args)
    join(process, device)
    with StopSignals() as signals:
        if args.validate_only:
            Trainer(args, process, device, signals).validate_only()
        else:
            with FolderLock() as lock:
                Trainer(args, process, device, signals, lock).fit()
    leave(process)  # not after an error: the other processes would be waited for in vain


class Trainer:
    """A training run of one process. Nothing is written before everything is built.

    Args:
        args: From the command line.
        process: This process.
        device: Where it trains.
        signals: Ask the run to leave.
        lock: Takes the run's folder, on the first process. Without it, nothing is to be written.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        process: Process,
        device: torch.device,
        signals: StopSignals,
        lock: FolderLock | None = None,
    ) -> None:
        self.args, self.process, self.device, self.signals, self.lock = args, process, device, signals, lock
        check_writable(run.runs_folder(args.output, args.tag) / args.experiment / run.SETTINGS)
        self.log_dir = Path(f"{args.log_dir.rstrip('/')}_{args.tag}") if args.log_dir else None
        if self.log_dir:
            check_writable(self.log_dir / run.SETTINGS)
        random_seed(args.seed)  # the same on all processes, so that they build the same model
        if args.deterministic:
            torch.use_deterministic_algorithms(True)

        train_data, validation_data, self.classes = build.open_data(args)
        self.datasets = (train_data, validation_data)
        resumed = resuming.find(args, process, device, lock)
        if resumed:
            check_same_classes(resumed.checkpoint.get("classes"), self.classes, "the checkpoint", "the data")
        self.model_arguments = build.model_arguments(args, self.classes)
        model = build.build_model(args, self.model_arguments).to(device)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        model = model.to(memory_format=self.memory_format)
        share = Share(process.rank, process.world_size)
        self.batches = build.build_batches(args, model, train_data, validation_data, device, share)
        self.learner = Learner(args, process, device, model, len(self.batches.train), resumed)
        self.num_epochs = self.learner.num_epochs
        self.first_epoch, self.first_batch = args.start_epoch or 0, 0
        self.epoch_so_far = dict(_NO_BATCH)  # of this process
        random_seed(args.seed, process.rank)
        self.is_new = not (resumed and resumed.folder)
        self.folder = self._new_folder() if self.is_new else resumed.folder
        self.checkpoints = run.Checkpoints(self.folder, args.checkpoint_hist, args.eval_metric == "loss")
        self.start = resume.number_of_start(run.positions_in(self.folder) if process.is_first else ())
        if resumed:
            self._find_position(resumed)
        self.rows = self._rows_before(resumed)
        self.last_complete_epoch = self.first_epoch - 1
        updates = self.first_epoch * self._steps(len(self.batches.train)) + self._steps(self.first_batch)
        self.learner.go_to(self.first_epoch, updates, resumed)
        self.learner.distribute()
        if resumed:
            self._restore_own_state(resumed)
        self.guard = FiniteGuard(process, device)
        self.position = (self.first_epoch, self.first_batch)  # epoch and batch, for messages

    # Set-up

    def _new_folder(self) -> Path:
        args = self.args
        size = args.input_size[-1] if args.input_size else self.batches.config["input_size"][-1]
        words = (args.output, args.tag, args.experiment, args.model, size)
        if self.lock is None:
            return by_first(partial(run.new_run_folder, *words), self.process, self.device)
        claim = partial(run.claim_new_folder, self.lock, *words, patience())
        return by_first(claim, self.process, self.device)

    def _find_position(self, resumed: resuming.Resumed) -> None:
        is_stream = isinstance(self.datasets[0], IterableDataset)
        self.first_epoch, self.first_batch = resumed.position(self._batching(), is_stream)
        if "checkpoints" in resumed.checkpoint:
            self.checkpoints.load_state(resumed.checkpoint["checkpoints"])

    def _rows_before(self, resumed: resuming.Resumed | None) -> list[dict[str, Any]]:
        """Return the rows of the summary for the epochs before the first: those in the checkpoint are complete."""
        if resumed is None:
            return []
        rows = resumed.checkpoint.get("summary")
        if not isinstance(rows, list):  # of an earlier version
            rows = report.read_summary(self.folder)
        return [row for row in rows if int(row["epoch"]) < self.first_epoch]

    def _restore_own_state(self, resumed: resuming.Resumed) -> None:
        """Restore what differs between processes: last, as DDP spreads the buffers of the first when it wraps."""
        states = resumed.checkpoint.get("processes", [])
        if len(states) == self.process.world_size:
            own = states[self.process.rank]
            resume.set_random_state(own["random"])
            self.learner.load_buffers(own["buffers"])
            if self.first_batch:
                self.epoch_so_far = own["epoch_so_far"]
        elif states:
            _logger.warning(
                "the run had %d processes and has %d now: its random numbers differ from here on",
                len(states),
                self.process.world_size,
            )

    def _batching(self) -> dict[str, float]:
        """Return what decides which images a batch of an epoch holds, and when the optimizer steps."""
        names = ("batch_size", "grad_accum_steps", "seed", "epoch_repeats", "aug_repeats")
        settings = {name: getattr(self.args, name) for name in names}
        return settings | {"images": len(self.datasets[0]), "processes": self.process.world_size}

    def _steps(self, batches: int) -> int:
        """Return the optimizer steps that the first batches of an epoch make."""
        return -(-batches // self.args.grad_accum_steps)

    # Running

    def fit(self) -> None:
        """Train to the last epoch."""
        if self.first_epoch < self.num_epochs:
            self._fit()
        else:
            _logger.info("all %d epochs of this run are done; raise --epochs to go on", self.num_epochs)
            if self.process.is_first and not self.is_new:
                remove_temporaries(self.folder)
                report.complete(self.folder, self.rows)
        if self.process.is_first:
            finish(self.folder)

    def _fit(self) -> None:
        reporter, epoch = self._open_report(), self.first_epoch
        try:
            with closing(reporter) if reporter else nullcontext():
                for epoch in range(self.first_epoch, self.num_epochs):
                    self._run_epoch(epoch, reporter)
        except Interruption as interruption:
            interruption.advice = f" in epoch {epoch}{interruption.advice or '; ' + self._how_to_go_on()}"
            raise
        for dataset in self.datasets:
            log_skipped(dataset)
        if self.checkpoints.best is not None:
            epoch, metric = self.checkpoints.best
            name = self.args.eval_metric
            _logger.info("best %s %.3f in epoch %d; everything is in %s", name, metric, epoch, self.folder)

    def _how_to_go_on(self) -> str:
        if not run.checkpoints_in(self.folder):
            return "no checkpoint was written yet"
        done = "none" if self.last_complete_epoch < 0 else self.last_complete_epoch
        return f"go on with --resume auto (last complete epoch: {done})"

    def validate_only(self) -> None:
        """Score the initial or resumed weights."""
        for name, scores in self._scores().items():
            figures = scores["top1"], scores["top5"], scores["loss"]
            _logger.info("%s: top-1 %.3f %%, top-5 %.3f %%, loss %.4f", name, *figures)

    def _open_report(self) -> report.RunReport | None:
        if not self.process.is_first:
            return None
        args = self.args
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.folder)
        if self.is_new and args.resume == NEVER:
            resuming.forget_preempted(args, self.folder)
        settings = run.settings_of(args)
        run.write_settings(self.folder, settings)
        begin(self.folder, args.resume, self.is_new, number=self.start)
        log_dir = self.log_dir or self.folder / "tensorboard"
        reporter = report.RunReport(self.folder, log_dir, self.first_epoch, settings, args.log_wandb)
        report.write_summary(self.folder, self.rows)
        parameters = sum(parameter.numel() for parameter in self.learner.task.get_trainable_module().parameters())
        _logger.info(
            "%s: %.1f M parameters on %s x %d, %d epochs of %d batches of %d; writing to %s",
            args.model,
            parameters / 1e6,
            self.device,
            self.process.world_size,
            self.num_epochs,
            len(self.batches.train),
            args.batch_size * self.process.world_size,
            self.folder,
        )
        if args.warmup_epochs >= args.epochs:
            _logger.warning(
                "the learning rate does not get beyond its warm-up: --warmup-epochs is %d, and --epochs only %d",
                args.warmup_epochs,
                args.epochs,
            )
        return reporter

    def _run_epoch(self, epoch: int, reporter: report.RunReport | None) -> None:
        args, started = self.args, time.monotonic()
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            self.batches.train.stop_mixup()
            if self.batches.mixup is not None:
                self.batches.mixup.mixup_enabled = False
        if args.mesa:
            self.learner.task.distilling = epoch / args.epochs > args.mesa_start_ratio
        train_loss, images_per_second = self._train_epoch(epoch)
        if self.process.is_distributed and args.dist_bn:
            for model in self.learner.models_on_device().values():
                distribute_bn(unwrap_model(model), self.process.world_size, args.dist_bn == "reduce")

        try:
            scores = self._scores()
        except AskedToLeaveError:
            self._leave(epoch, len(self.batches.train))
        judged = scores.get("averaged", scores["raw"])
        lr = self.learner.lr
        self.learner.scheduler.step(epoch + 1, judged[args.eval_metric])
        is_best = self.checkpoints.rank(epoch, judged[args.eval_metric])
        training = {"loss": train_loss, "images_per_second": round(images_per_second, 1)}
        self.rows.append(report.summary_row(epoch, training, judged, lr))
        if not args.no_saver:  # with the row: no summary lacks it, whenever the run is killed
            self._save(epoch, is_best=is_best)
        if reporter is not None:
            self._check_folder()
            report.write_summary(self.folder, self.rows)
            reporter.epoch(epoch, training, scores["raw"], scores.get("averaged"), lr)
        best_epoch, best = self.checkpoints.best
        remaining = (time.monotonic() - started) * (self.num_epochs - 1 - epoch)
        _logger.info(
            "epoch %d: training loss %.4f, validation loss %.4f, top-1 %.2f %%, top-5 %.2f %%, lr %.3g, %.1f images/s "
            "(best %s %.3f in epoch %d), ETA of the run %s",
            epoch, train_loss, judged["loss"], judged["top1"], judged["top5"], lr, images_per_second,
            args.eval_metric, best, best_epoch, report.duration(remaining),
        )  # fmt: skip

    def _scores(self) -> dict[str, dict[str, float]]:
        scores = {}
        for name, model in self.learner.models_on_device().items():
            title = "validation" if name == "raw" else "validation (averaged)"
            total = len(self.batches.validation)
            with report.progress(title, total, self.args.log_interval, self.process.is_first, log_end=False) as line:
                scores[name] = evaluate(
                    unwrap_model(model),
                    self.batches.validation,
                    self.device,
                    autocast=self.learner.autocast,
                    memory_format=self.memory_format,
                    distributed=self.process.is_distributed,
                    on_batch=partial(self._after_validation_batch, line),
                )
        return scores

    def _after_validation_batch(self, line: report.ProgressLine | None, batch: int, images: int) -> None:
        if line is not None:
            line.step(str)
        # Of a stream, processes may have more or fewer batches: they could not ask each other after each of them.
        can_ask = not self.process.is_distributed or not isinstance(self.datasets[1], IterableDataset)
        if can_ask:
            self.signals.raise_if_received(self.process, self.device)

    def _train_epoch(self, epoch: int) -> tuple[float, float]:
        """Return the mean loss over the images of the epoch, and the images a second."""
        args, total, task = self.args, len(self.batches.train), self.learner.task
        first_batch, self.first_batch = self.first_batch, 0
        if not first_batch:
            self.epoch_so_far = dict(_NO_BATCH)
        so_far = [self.epoch_so_far["loss_sum"], self.epoch_so_far["images"]]
        total_loss = torch.tensor(so_far, dtype=torch.float64, device=self.device)
        images_here, started, rate = 0, time.monotonic(), 0.0
        task.train()
        self.learner.optimizer.zero_grad()
        with report.progress(f"epoch {epoch}", total, args.log_interval, self.process.is_first, first_batch) as line:
            for batch, (images, targets) in enumerate(self.batches.train.epoch(epoch, first_batch), first_batch):
                self.position = (epoch, batch)
                images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
                targets = targets.to(self.device, non_blocking=True)
                if self.batches.mixup is not None:
                    images, targets = self.batches.mixup(images, targets)
                is_step = (batch + 1) % args.grad_accum_steps == 0 or batch + 1 == total
                with nullcontext() if is_step else task.no_sync():
                    with self.learner.autocast():
                        loss = task(images, targets)["loss"]
                    total_loss += _loss_and_images(loss, len(images))
                    self.guard.note(loss, partial(self.batches.train.sample_names, epoch, batch))
                    self.learner.backward(loss / self._group_size(batch, total))
                images_here += len(images)
                is_asked = is_step and self._finish_step()
                rate = images_here * self.process.world_size / (time.monotonic() - started)
                is_logged = line is not None and line.step(partial(self._progress_text, total_loss, rate))
                if is_logged and args.save_images:
                    self._save_images(images, epoch, batch)
                if is_step:
                    self._save_on_the_way(epoch, batch + 1, total_loss, is_asked)
        self._note_so_far(total_loss)
        return mean(total_loss[0] / total_loss[1], self.process), rate

    def _note_so_far(self, total_loss: Tensor) -> None:
        loss_sum, images = total_loss.tolist()
        self.epoch_so_far = {"loss_sum": loss_sum, "images": int(images)}

    def _progress_text(self, total_loss: Tensor, rate: float) -> str:
        return f"loss {(total_loss[0] / total_loss[1]).item():.4f}  lr {self.learner.lr:.3g}  {rate:.1f} images/s"

    def _group_size(self, batch: int, total: int) -> int:
        """Return how many batches share the optimizer step of this one; the last group of an epoch may be smaller."""
        size = self.args.grad_accum_steps
        return min(size, total - batch // size * size)

    def _finish_step(self) -> bool:
        """Take the optimizer's step if all is finite; return whether any process was asked to leave."""
        try:
            has_scale = self.learner.scaler.is_enabled()
            is_asked = self.guard.check(self.learner.gradients(), self.signals.received, has_scale)
            self.guard.count_skip(self.learner.step())
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} {self._about_the_step()}") from None
        return is_asked

    def _about_the_step(self) -> str:
        """Return what to add to the message of a step that must not be taken."""
        epoch, batch = self.position
        files = [self.folder / name for name in (run.RECOVERY, run.LAST) if (self.folder / name).exists()]
        kept = f"{files[0]} is untouched" if files else "no checkpoint was written yet"
        return (
            f"It was epoch {epoch}, batch {batch}, at learning rate {self.learner.lr:.3g} ({kept}). Lower --lr, "
            "lengthen --warmup-epochs, or use --bfloat instead of float16."
        )

    # Saving

    def _save_on_the_way(self, epoch: int, next_batch: int, total_loss: Tensor, is_asked: bool) -> None:
        """Save inside an epoch when it is time to; leave if asked to."""
        args = self.args
        is_due = args.recovery_interval and self.learner.updates % args.recovery_interval == 0
        is_due = is_due and not args.no_saver and next_batch < len(self.batches.train)
        if is_asked or is_due:
            self._note_so_far(total_loss)
        if is_asked:
            self._leave(epoch, next_batch)
        if is_due:
            self._save(epoch, next_batch=next_batch)

    def _leave(self, epoch: int, next_batch: int) -> NoReturn:
        if self.args.no_saver:
            leave(self.process)
            raise Preempted("; --no-saver: nothing was saved, and the run would start over")
        self._save(epoch, next_batch=next_batch)
        leave_preempted(self.process, self.folder, "; the same command goes on from there")

    def _save(self, epoch: int, *, is_best: bool = False, next_batch: int | None = None) -> None:
        checkpoint = self._state(epoch, next_batch)  # all processes take part
        if not self.process.is_first:
            return
        self._check_folder()
        if next_batch is None:
            self.checkpoints.write(checkpoint, epoch, is_best)
            self.last_complete_epoch = epoch
        else:
            save_checkpoint(checkpoint, self.folder / run.RECOVERY)

    def _check_folder(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _state(self, epoch: int, next_batch: int | None) -> OrderedDict[str, Any]:
        """Return everything that a run needs to go on, and a program to use the model, in types that load safely."""
        own = {
            "random": resume.random_state(),
            "buffers": self.learner.buffers(),
            "epoch_so_far": self.epoch_so_far,
        }
        state = OrderedDict(
            epoch=epoch,
            next_batch=next_batch,  # None: the epoch is finished
            started=self.start,
            summary=self.rows,
            batching=self._batching(),
            arch=self.args.model,
            model_kwargs=self.model_arguments,
            data_config=self.batches.config,
            exif_transpose=self.args.exif_transpose,
            classes=self.classes,
            version=2,
            **self.learner.state(),
            args=vars(self.args),
            checkpoints=self.checkpoints.state(),
            processes=of_all(own, self.process),
        )
        if self.checkpoints.best is not None:
            state["metric"] = self.checkpoints.best[1]
        return state

    def _save_images(self, images: Tensor, epoch: int, batch: int) -> None:
        from torchvision.utils import save_image

        save_image(images, self.folder / f"train-epoch{epoch}-batch{batch}.jpg", padding=0, normalize=True)


def _loss_and_images(loss: Tensor, images: int) -> Tensor:
    """Return the sum of the losses of a batch and its images; zeros if a loss scale skips it, as it is not finite."""
    loss = loss.detach().double()
    sums = torch.stack((loss * images, torch.full_like(loss, images)))
    return sums.where(loss.isfinite(), 0.0)
