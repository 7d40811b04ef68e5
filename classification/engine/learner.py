"""What training changes: weights, their average, the optimizer, the loss scale and the schedule."""

import argparse
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.utils import dispatch_clip_grad, get_state_dict, unwrap_model
from torch import Tensor, nn

from engine import build, sharding
from engine.execution import training_precision
from engine.resuming import Resumed
from mambavision.checkpoint import EMA_KEYS, load_weights
from mambavision.errors import CheckpointError
from mambavision.launch import Process

_logger = logging.getLogger(__name__)

_SCALE = "amp_scaler"


class Learner:
    """A model in training.

    Attributes:
        task: Model, objective and averaged weights.
        updates: Optimizer steps so far.
        num_epochs: Of the schedule, cool-down included.

    Args:
        args: Options of train.py.
        process: This process among all.
        device: Where the model is.
        model: What learns.
        batches: Of an epoch.
        resumed: The checkpoint to go on from, if any.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        process: Process,
        device: torch.device,
        model: nn.Module,
        batches: int,
        resumed: Resumed | None,
    ) -> None:
        self.args, self.process, self.device = args, process, device
        dtype = training_precision(args, device)
        self.autocast = partial(torch.autocast, device_type=device.type, dtype=dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.task = build.build_task(args, model, device)
        if resumed:
            self._load_weights(resumed)
        if args.fsdp:
            sharding.shard(self.task, process, device)
        self.optimizer = build.build_optimizer(args, model, process.world_size)
        if resumed and resumed.with_optimizer:
            self._load_optimizer(resumed)
        self.scheduler, self.num_epochs = build.build_scheduler(args, self.optimizer, batches, process.world_size)
        self.updates = 0
        lr, batch = build.learning_rates(args, process.world_size)["lr"], build.global_batch(args, process.world_size)
        _logger.info("learning rate %.4g for a global batch of %d images", lr, batch)

    # Going on

    def _load_weights(self, resumed: Resumed) -> None:
        path, checkpoint = str(resumed.path), resumed.checkpoint
        load_weights(unwrap_model(self.task.get_eval_model()), checkpoint, path)
        if self.task.has_ema():
            has_ema = any(checkpoint.get(key) for key in EMA_KEYS)
            if not has_ema:
                _logger.warning("the checkpoint has no averaged weights: the average starts from its weights")
            load_weights(unwrap_model(self.task.get_eval_model(ema=True)), checkpoint, path, ema=has_ema)

    def _load_optimizer(self, resumed: Resumed) -> None:
        path, checkpoint = resumed.path, resumed.checkpoint
        if "optimizer" not in checkpoint:
            raise CheckpointError(f"{path}: has no optimizer state; add --no-resume-opt to go on without.")
        opt = resumed.settings.get("opt", self.args.opt)
        try:
            self.optimizer.load_state_dict(sharding.sharded_optimizer_state(checkpoint["optimizer"], self.optimizer))
            groups = self.optimizer.param_groups
            fits = opt == self.args.opt and all(self.optimizer.defaults.keys() <= group.keys() for group in groups)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):  # torch checks next to nothing
            fits = False
        if not fits:
            raise CheckpointError(
                f"{path}: its optimizer state does not fit (--opt was {opt} and is {self.args.opt}); give --opt, "
                "--layer-decay and --weight-decay as before, or add --no-resume-opt to start without it."
            )
        if self.scaler.is_enabled() and _SCALE in checkpoint:
            self.scaler.load_state_dict(checkpoint[_SCALE])

    def go_to(self, epoch: int, updates: int, resumed: Resumed | None) -> None:
        """Bring the schedule to a step. It follows from the step count; plateau alone has a memory."""
        self.updates = updates
        if not isinstance(self.scheduler, PlateauLRScheduler):
            self.scheduler.step(epoch)
            self.scheduler.step_update(updates)
            return
        plateau = resumed.checkpoint.get("plateau") if resumed and resumed.with_optimizer else None
        if plateau is not None:
            self.scheduler.lr_scheduler.load_state_dict(plateau["state"])
            self.scheduler.restore_lr = plateau["restore_lr"]
        warmup = self.scheduler.warmup_t
        if warmup and (plateau is None or epoch <= warmup):
            self.scheduler.step(min(epoch, warmup))

    # Training

    def distribute(self) -> None:
        """Let the processes learn together."""
        if self.process.is_distributed and not self.args.fsdp:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.task.prepare_distributed(device_ids=ids, broadcast_buffers=not self.args.no_ddp_bb)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those of the batches before."""
        self.scaler.scale(loss).backward()

    def gradients(self) -> Iterator[Tensor]:
        """Yield what must be finite before a step; a loss scale looks after overflow by itself."""
        if not self.scaler.is_enabled():
            for parameter in self.task.get_trainable_module().parameters():
                if parameter.grad is not None:
                    yield parameter.grad

    def step(self) -> bool:
        """Let optimizer, schedule and average take a step; return whether the loss scale let it be skipped."""
        self.updates += 1
        self.scheduler.step_update(self.updates)
        if self.args.clip_grad:
            self.scaler.unscale_(self.optimizer)
            mode = self.args.clip_mode
            parameters = list(self.task.get_clip_parameters(exclude_head=mode == "agc"))
            dispatch_clip_grad(parameters, self.args.clip_grad, mode=mode)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.task.update_ema()
        return self.scaler.get_scale() < scale

    def models_on_device(self) -> dict[str, nn.Module]:
        """Return the model and its average, unless that is kept on the CPU: too slow there, and out of nccl's reach."""
        models = {"raw": self.task.get_eval_model()}
        if self.task.has_ema() and not self.args.model_ema_force_cpu:
            models["averaged"] = self.task.get_eval_model(ema=True)
        return models

    # Saving

    def state(self) -> dict[str, Any]:
        """Return what checkpoints hold of it, in types that load safely; to be called on all processes."""
        state = {
            "state_dict": get_state_dict(self.task.get_eval_model(), unwrap_model),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.task.has_ema():
            state["state_dict_ema"] = get_state_dict(self.task.get_eval_model(ema=True), unwrap_model)
        if self.scaler.is_enabled():
            state[_SCALE] = self.scaler.state_dict()
        if isinstance(self.scheduler, PlateauLRScheduler):
            plateau = {"state": self.scheduler.lr_scheduler.state_dict(), "restore_lr": self.scheduler.restore_lr}
            state["plateau"] = plateau
        return sharding.whole(state, self.process.is_first) if self.args.fsdp else state

    def buffers(self) -> dict[str, Tensor]:
        """Return batch statistics and the like, which differ between processes until the end of an epoch."""
        if not self.process.is_distributed:
            return {}
        return {name: buffer.cpu() for name, buffer in self._named_buffers().items()}

    def load_buffers(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `buffers` returned."""
        own = self._named_buffers()
        for name in own.keys() & saved.keys():  # options can switch the average on or off
            own[name].copy_(saved[name])

    def _named_buffers(self) -> dict[str, Tensor]:
        found = {}
        for kind in ("model", "average") if self.task.has_ema() else ("model",):
            model = unwrap_model(self.task.get_eval_model(ema=kind == "average"))
            saved = model.state_dict().keys()  # others are constants
            found |= {f"{kind}.{name}": buffer for name, buffer in model.named_buffers() if name in saved}
        return found
