"""The training loop."""

import argparse
import logging
import time
from collections import OrderedDict
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from timm.scheduler import PlateauLRScheduler
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn, get_state_dict, random_seed, unwrap_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from engine import build, data, report, run
from engine.evaluate import evaluate
from engine.loaders import Share
from engine.values import check_values
from mambavision import resume
from mambavision.checkpoint import EMA_KEYS, check_writable, load_weights, read_checkpoint, save_checkpoint
from mambavision.errors import BAD_DATA, CheckpointError, Interruption, UserError
from mambavision.launch import Process, join, leave, pick_device, this_process
from mambavision.reporting import start_logging

_logger = logging.getLogger(__name__)


class NonFiniteLossError(UserError):
    """The loss is infinite or not a number."""

    exit_status = BAD_DATA


def train(args: argparse.Namespace) -> None:
    """Train, or only evaluate with --validate-only."""
    process = this_process()
    device = pick_device(args.device, process)
    start_logging(process.is_first)
    build.check_options(args, device)
    check_values(args)
    join(process, device)
    trainer = Trainer(args, process, device)
    if args.validate_only:
        trainer.validate_only()
    else:
        trainer.fit()
    leave(process)  # not after an error: the other processes would be waited for in vain


class Trainer:
    """A training run of one process. Nothing is written before everything is built."""

    def __init__(self, args: argparse.Namespace, process: Process, device: torch.device) -> None:
        self.args, self.process, self.device = args, process, device
        check_writable(run.runs_folder(args.output, args.tag) / run.SETTINGS)
        self.log_dir = Path(f"{args.log_dir.rstrip('/')}_{args.tag}") if args.log_dir else None
        if self.log_dir:
            check_writable(self.log_dir / run.SETTINGS)
        random_seed(args.seed)  # the same on all processes, so that they build the same model
        if args.deterministic:
            torch.use_deterministic_algorithms(True)

        train_data, validation_data, self.classes = build.open_data(args)
        self.datasets = (train_data, validation_data)
        resumed = self._find_checkpoint()
        self.model_arguments = build.model_arguments(args, self.classes)
        model = build.build_model(args, self.model_arguments).to(device)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        model = model.to(memory_format=self.memory_format)
        share = Share(process.rank, process.world_size)
        self.batches = build.build_batches(args, model, train_data, validation_data, device, share)
        self.autocast, self.scaler = self._mixed_precision()

        self.task = build.build_task(args, model, device)
        self.optimizer = build.build_optimizer(args, model)
        self.scheduler, self.num_epochs = build.build_scheduler(
            args, self.optimizer, len(self.batches.train), process.world_size
        )
        self.first_epoch, self.first_batch = args.start_epoch or 0, 0
        self.epoch_so_far = {"loss_sum": 0.0, "images": 0}  # of an epoch that was interrupted
        random_seed(args.seed, process.rank)
        self.folder = (resumed and run.folder_of(resumed[0])) or self._new_folder()
        self.checkpoints = run.Checkpoints(self.folder, args.checkpoint_hist, args.eval_metric == "loss")
        if resumed:
            self._resume(*resumed)
        self.last_complete_epoch = self.first_epoch - 1
        self.updates = self.first_epoch * self._steps_per_epoch() + self.first_batch // args.grad_accum_steps
        self._move_schedule(resumed[1].get("plateau") if resumed and not args.no_resume_opt else None)
        if process.is_distributed:
            ids = [device.index] if device.type == "cuda" else None
            self.task.prepare_distributed(device_ids=ids, broadcast_buffers=not args.no_ddp_bb)

    # Set-up

    def _mixed_precision(self) -> tuple[Any, NativeScaler | None]:
        args, kind = self.args, self.device.type
        if args.amp and kind == "cpu" and not args.bfloat:
            _logger.info("mixed precision is off: float16 is slow on a CPU (use --amp --bfloat for bfloat16)")
        elif args.amp:
            dtype = torch.bfloat16 if args.bfloat else torch.float16
            scaler = NativeScaler(device=kind) if dtype == torch.float16 else None
            return partial(torch.autocast, device_type=kind, dtype=dtype), scaler
        return nullcontext, None

    def _new_folder(self) -> Path:
        size = self.args.input_size[-1] if self.args.input_size else self.batches.config["input_size"][-1]
        args = self.args
        folder = run.new_run_folder(args.output, args.tag, args.experiment, args.model, size)
        return Path(self._of_first(str(folder)))

    def _of_first(self, value: Any) -> Any:
        """Return the first process's value on all processes."""
        if not self.process.is_distributed:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def _find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the checkpoint that --resume means and its path, or None."""
        args = self.args
        if not args.resume:
            return None
        if args.resume == "auto":
            files = run.resumable_checkpoints(args.output, args.tag, args.experiment)
            found = resume.newest_valid(files) if self.process.is_first else None
            path = self._of_first(found and found[0])
            if path is None:
                folder = run.runs_folder(args.output, args.tag) / args.experiment
                _logger.info("nothing to resume in %s: starting anew", folder)
                return None
            checkpoint = found[1] if found else read_checkpoint(path)
        else:
            path = Path(args.resume)
            checkpoint = read_checkpoint(path, args.trust_checkpoint)
        if not isinstance(checkpoint.get("epoch"), int):
            raise CheckpointError(f"{path}: does not say its epoch; start from its weights with --initial-checkpoint.")
        _logger.info("resuming %s", path)
        data.check_same_classes(checkpoint.get("classes"), self.classes, "the checkpoint", "the data")
        return path, checkpoint

    def _resume(self, path: Path, checkpoint: dict[str, Any]) -> None:
        load_weights(unwrap_model(self.task.get_eval_model()), checkpoint, str(path))
        if self.task.has_ema():
            has_ema = any(checkpoint.get(key) for key in EMA_KEYS)
            if not has_ema:
                _logger.warning("the checkpoint has no averaged weights: the average starts from its weights")
            load_weights(unwrap_model(self.task.get_eval_model(ema=True)), checkpoint, str(path), ema=has_ema)
        if not self.args.no_resume_opt:
            self._resume_optimizer(path, checkpoint)
        self._resume_position(checkpoint)
        if "checkpoints" in checkpoint:
            self.checkpoints.load_state(checkpoint["checkpoints"])
        states = checkpoint.get("random", [])
        if len(states) == self.process.world_size:
            resume.set_random_state(states[self.process.rank])
        elif states:
            _logger.warning(
                "the run had %d processes and has %d now: its random numbers differ from here on",
                len(states),
                self.process.world_size,
            )

    def _resume_optimizer(self, path: Path, checkpoint: dict[str, Any]) -> None:
        if "optimizer" not in checkpoint:
            raise CheckpointError(f"{path}: has no optimizer state; add --no-resume-opt to go on without.")
        settings = checkpoint.get("args") or {}  # timm and the originals save a namespace
        opt = (settings if isinstance(settings, dict) else vars(settings)).get("opt", self.args.opt)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            groups = self.optimizer.param_groups
            fits = opt == self.args.opt and all(self.optimizer.defaults.keys() <= group.keys() for group in groups)
        except (KeyError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(
                f"{path}: its optimizer state does not fit (--opt was {opt} and is {self.args.opt}); give --opt, "
                "--layer-decay and --weight-decay as before, or add --no-resume-opt to start without it."
            )
        if self.scaler is not None and self.scaler.state_dict_key in checkpoint:
            self.scaler.load_state_dict(checkpoint[self.scaler.state_dict_key])

    def _resume_position(self, checkpoint: dict[str, Any]) -> None:
        """Find where to go on; an interrupted epoch starts over if its batches are no longer the same."""
        next_batch = checkpoint.get("next_batch")  # None: the epoch was finished
        self.first_epoch = checkpoint["epoch"] + (next_batch is None)
        is_stream = isinstance(self.datasets[0], IterableDataset)  # can be read from its beginning only
        if self.args.start_epoch is not None:
            self.first_epoch = self.args.start_epoch
        elif next_batch is not None and not is_stream and checkpoint.get("batching") == self._batching():
            self.first_batch, self.epoch_so_far = next_batch, checkpoint["epoch_so_far"]
        elif next_batch is not None:
            _logger.warning("epoch %d starts over: its batches are not those it was interrupted in", self.first_epoch)

    def _batching(self) -> dict[str, float]:
        """Return what decides which images a batch of an epoch holds, and when the optimizer steps."""
        names = ("batch_size", "grad_accum_steps", "seed", "epoch_repeats", "aug_repeats")
        settings = {name: getattr(self.args, name) for name in names}
        return settings | {"images": len(self.datasets[0]), "processes": self.process.world_size}

    def _move_schedule(self, plateau: dict[str, Any] | None) -> None:
        """Bring the schedule to the first step. It follows from the step count; plateau alone has a memory."""
        if not isinstance(self.scheduler, PlateauLRScheduler):
            self.scheduler.step(self.first_epoch)
            self.scheduler.step_update(self.updates)
            return
        if plateau is not None:
            self.scheduler.lr_scheduler.load_state_dict(plateau["state"])
            self.scheduler.restore_lr = plateau["restore_lr"]
        warmup = self.scheduler.warmup_t
        if warmup and (plateau is None or self.first_epoch <= warmup):
            self.scheduler.step(min(self.first_epoch, warmup))

    def _steps_per_epoch(self) -> int:
        return -(-len(self.batches.train) // self.args.grad_accum_steps)

    # Running

    def fit(self) -> None:
        """Train to the last epoch."""
        if self.first_epoch >= self.num_epochs:
            _logger.info("all %d epochs of this run are done; raise --epochs to go on", self.num_epochs)
            return
        reporter, epoch = self._open_report(), self.first_epoch
        try:
            with closing(reporter) if reporter else nullcontext():
                for epoch in range(self.first_epoch, self.num_epochs):
                    self._run_epoch(epoch, reporter)
        except Interruption as interruption:
            if not self.process.is_first:  # one process is enough to say it
                raise SystemExit(interruption.exit_status) from None
            interruption.advice = f" in epoch {epoch}; {self._how_to_go_on()}"
            raise
        for dataset in self.datasets:
            data.log_skipped(dataset)
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
        settings = {key: value for key, value in vars(args).items() if key not in ("config", "local_rank", "resume")}
        run.write_settings(self.folder, settings)
        log_dir = self.log_dir or self.folder / "tensorboard"
        reporter = report.RunReport(self.folder, log_dir, self.first_epoch, settings, args.log_wandb)
        parameters = sum(parameter.numel() for parameter in self.task.get_trainable_module().parameters())
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
            self.task.distilling = epoch / args.epochs > args.mesa_start_ratio
        train_loss, images_per_second = self._train_epoch(epoch)
        if self.process.is_distributed and args.dist_bn:
            for model in self._models_on_device().values():
                distribute_bn(unwrap_model(model), self.process.world_size, args.dist_bn == "reduce")

        scores = self._scores()
        judged = scores.get("averaged", scores["raw"])
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step(epoch + 1, judged[args.eval_metric])
        is_best = self.checkpoints.rank(epoch, judged[args.eval_metric])
        if not args.no_saver:
            self._save(epoch, is_best=is_best)
        if reporter is not None:
            training = {"loss": train_loss, "images_per_second": round(images_per_second, 1)}
            reporter.epoch(epoch, training, scores["raw"], scores.get("averaged"), lr)
        best_epoch, best = self.checkpoints.best
        remaining = (time.monotonic() - started) * (self.num_epochs - 1 - epoch)
        _logger.info(
            "epoch %d: training loss %.4f, validation loss %.4f, top-1 %.2f %%, top-5 %.2f %%, lr %.3g, %.1f images/s "
            "(best %s %.3f in epoch %d), ETA of the run %s",
            epoch, train_loss, judged["loss"], judged["top1"], judged["top5"], lr, images_per_second,
            args.eval_metric, best, best_epoch, report.duration(remaining),
        )  # fmt: skip

    def _models_on_device(self) -> dict[str, nn.Module]:
        """Return the model and its average, unless that is kept on the CPU: too slow there, and out of nccl's reach."""
        models = {"raw": self.task.get_eval_model()}
        if self.task.has_ema() and not self.args.model_ema_force_cpu:
            models["averaged"] = self.task.get_eval_model(ema=True)
        return models

    def _scores(self) -> dict[str, dict[str, float]]:
        scores = {}
        for name, model in self._models_on_device().items():
            title = "validation" if name == "raw" else "validation (averaged)"
            total = len(self.batches.validation)
            with report.progress(title, total, self.args.log_interval, self.process.is_first, log_end=False) as line:
                scores[name] = evaluate(
                    unwrap_model(model),
                    self.batches.validation,
                    self.device,
                    autocast=self.autocast,
                    memory_format=self.memory_format,
                    distributed=self.process.is_distributed,
                    on_batch=lambda batch, images, line=line: line and line.step(str),
                )
        return scores

    def _train_epoch(self, epoch: int) -> tuple[float, float]:
        """Return the mean loss over the images of the epoch, and the images a second."""
        args, total = self.args, len(self.batches.train)
        first_batch, self.first_batch = self.first_batch, 0
        so_far, self.epoch_so_far = self.epoch_so_far, {"loss_sum": 0.0, "images": 0}
        loss_sum = torch.tensor(so_far["loss_sum"], dtype=torch.float64, device=self.device)
        images_seen, images_here, started, rate = so_far["images"], 0, time.monotonic(), 0.0
        is_finite = torch.ones((), device=self.device)
        self.task.train()
        self.optimizer.zero_grad()
        with report.progress(f"epoch {epoch}", total, args.log_interval, self.process.is_first, first_batch) as line:
            for batch, (images, targets) in enumerate(self.batches.train.epoch(epoch, first_batch), first_batch):
                images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
                targets = targets.to(self.device, non_blocking=True)
                if self.batches.mixup is not None:
                    images, targets = self.batches.mixup(images, targets)
                is_step = (batch + 1) % args.grad_accum_steps == 0 or batch + 1 == total
                with nullcontext() if is_step else self.task.no_sync():
                    with self.autocast():
                        loss = self.task(images, targets)["loss"]
                    loss_sum += loss.detach().double() * len(images)
                    is_finite = is_finite * torch.isfinite(loss.detach())
                    if is_step:
                        self._require_finite(is_finite, epoch, batch)
                    self._backward(loss / self._group_size(batch, total), is_step)
                images_seen, images_here = images_seen + len(images), images_here + len(images)
                is_recovery_point = args.recovery_interval and self.updates % args.recovery_interval == 0
                if is_step and is_recovery_point and batch + 1 < total:
                    so_far = {"loss_sum": loss_sum.item(), "images": images_seen}
                    self._save(epoch, next_batch=batch + 1, epoch_so_far=so_far)
                rate = images_here * self.process.world_size / (time.monotonic() - started)
                is_logged = line is not None and line.step(partial(self._progress_text, loss_sum, images_seen, rate))
                if is_logged and args.save_images:
                    self._save_images(images, epoch, batch)
        return self._mean_over_processes(loss_sum / images_seen), rate

    def _progress_text(self, loss_sum: Tensor, images: int, rate: float) -> str:
        lr = self.optimizer.param_groups[0]["lr"]
        return f"loss {loss_sum.item() / images:.4f}  lr {lr:.3g}  {rate:.1f} images/s"

    def _group_size(self, batch: int, total: int) -> int:
        """Return how many batches share the optimizer step of this one; the last group of an epoch may be smaller."""
        size = self.args.grad_accum_steps
        return min(size, total - batch // size * size)

    def _require_finite(self, is_finite: Tensor, epoch: int, batch: int) -> None:
        """Stop on all processes at once if the loss of any is not finite; the weights are still those of before."""
        if self.process.is_distributed:
            torch.distributed.all_reduce(is_finite, torch.distributed.ReduceOp.MIN)
        if not is_finite.item():
            last = self.folder / run.LAST
            kept = f"{last} is untouched" if last.exists() else "no checkpoint was written yet"
            raise NonFiniteLossError(
                f"the loss is not finite in epoch {epoch}, batch {batch}, at learning rate "
                f"{self.optimizer.param_groups[0]['lr']:.3g}; stopped before the optimizer step ({kept}). Lower --lr, "
                "lengthen --warmup-epochs, or use --bfloat instead of float16."
            )

    def _backward(self, loss: Tensor, is_step: bool) -> None:
        args = self.args
        if is_step:
            self.updates += 1
            self.scheduler.step_update(self.updates)
        parameters = list(self.task.get_clip_parameters(exclude_head=args.clip_mode == "agc"))
        clip = args.clip_grad or None
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip, args.clip_mode, parameters, need_update=is_step)
        else:
            loss.backward()
        if not is_step:
            return
        if self.scaler is None:
            if clip is not None:
                dispatch_clip_grad(parameters, clip, mode=args.clip_mode)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.task.update_ema()

    def _mean_over_processes(self, value: Tensor) -> float:
        if self.process.is_distributed:
            torch.distributed.all_reduce(value)
            value /= self.process.world_size
        return value.item()

    # Saving

    def _save(self, epoch: int, *, is_best: bool = False, next_batch: int | None = None, **more: Any) -> None:
        checkpoint = self._state(epoch, next_batch) | more  # all processes take part
        if not self.process.is_first:
            return
        if next_batch is None:
            self.checkpoints.write(checkpoint, epoch, is_best)
            self.last_complete_epoch = epoch
        else:
            save_checkpoint(checkpoint, self.folder / run.RECOVERY)

    def _state(self, epoch: int, next_batch: int | None) -> OrderedDict[str, Any]:
        """Return everything that a run needs to go on, and a program to use the model, in types that load safely."""
        state = OrderedDict(
            epoch=epoch,
            next_batch=next_batch,
            batching=self._batching(),
            arch=self.args.model,
            model_kwargs=self.model_arguments,
            data_config=self.batches.config,
            exif_transpose=self.args.exif_transpose,
            classes=self.classes,
            version=2,
            state_dict=get_state_dict(self.task.get_eval_model(), unwrap_model),
            optimizer=self.optimizer.state_dict(),
            args=vars(self.args),
            checkpoints=self.checkpoints.state(),
            random=self._random_states(),
        )
        if self.task.has_ema():
            state["state_dict_ema"] = get_state_dict(self.task.get_eval_model(ema=True), unwrap_model)
        if self.scaler is not None:
            state[self.scaler.state_dict_key] = self.scaler.state_dict()
        if isinstance(self.scheduler, PlateauLRScheduler):
            plateau = {"state": self.scheduler.lr_scheduler.state_dict(), "restore_lr": self.scheduler.restore_lr}
            state["plateau"] = plateau
        if self.checkpoints.best is not None:
            state["metric"] = self.checkpoints.best[1]
        return state

    def _random_states(self) -> list[dict[str, Any]]:
        own = resume.random_state()
        if not self.process.is_distributed:
            return [own]
        states: list[Any] = [None] * self.process.world_size
        torch.distributed.all_gather_object(states, own)
        return states

    def _save_images(self, images: Tensor, epoch: int, batch: int) -> None:
        from torchvision.utils import save_image

        save_image(images, self.folder / f"train-epoch{epoch}-batch{batch}.jpg", padding=0, normalize=True)
