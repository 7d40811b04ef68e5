"""Trainable state of a run: model, averaged weights, optimizer, loss scale and schedule."""

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.utils import dispatch_clip_grad, get_state_dict, unwrap_model
from torch import Tensor, nn

from engine import sharding
from engine.acceleration import training_precision
from engine.objective import build_task
from engine.options import TrainOptions
from engine.remedies import naming_flags
from engine.resume import Resumed
from engine.schedule import build_optimizer, build_scheduler, global_batch, learning_rates
from mambavision.checkpoint import EMA_KEYS, load_weights
from mambavision.errors import CheckpointError
from mambavision.running.group import Group

_logger = logging.getLogger(__name__)

_SCALE = "amp_scaler"


class Learner:
    """The model being trained, with its optimizer, loss scale and schedule.

    Attributes:
        task: Model, objective and averaged weights.
        updates: Optimizer steps so far.
        num_epochs: Length of the schedule, including the cool-down.

    Args:
        options: Options of train.py.
        group: All processes.
        model: The model to train, on the group's device.
        batches: Number of batches of this process in an epoch.
        resumed: The checkpoint to resume, if any.
    """

    def __init__(
        self, options: TrainOptions, group: Group, model: nn.Module, batches: int, resumed: Resumed | None
    ) -> None:
        self.options, self.group = options, group
        device = group.device
        dtype = training_precision(options.run.amp, options.run.bfloat, device)
        self.autocast = partial(torch.autocast, device_type=device.type, dtype=dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.task = build_task(options, model, device)
        if resumed:
            self._load_weights(resumed)
        if options.averaging.fsdp:
            sharding.shard(self.task, group)
        self.optimizer = build_optimizer(options, model, group.size)
        if resumed and resumed.with_optimizer:
            self._load_optimizer(resumed)
        self.scheduler, self.num_epochs = build_scheduler(options, self.optimizer, batches, group.size)
        self.updates = 0
        lr, batch = learning_rates(options, group.size)["lr"], global_batch(options, group.size)
        _logger.info("learning rate %.4g for a global batch of %d images", lr, batch)

    # Resuming

    @naming_flags(training=True)
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
            raise CheckpointError(f"{path}: has no optimizer state; add --no-resume-opt to resume without it.")
        wanted = self.options.optimizer.opt
        opt = resumed.settings.get("opt", wanted)
        try:
            self.optimizer.load_state_dict(sharding.sharded_optimizer_state(checkpoint["optimizer"], self.optimizer))
            groups = self.optimizer.param_groups
            fits = opt == wanted and all(self.optimizer.defaults.keys() <= group.keys() for group in groups)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):  # torch hardly checks anything
            fits = False
        if not fits:
            raise CheckpointError(
                f"{path}: its optimizer state does not fit (--opt was {opt} and is {wanted}); give --opt, "
                "--layer-decay and --weight-decay as before, or add --no-resume-opt to start without it."
            )
        if self.scaler.is_enabled() and _SCALE in checkpoint:
            self.scaler.load_state_dict(checkpoint[_SCALE])

    def go_to(self, epoch: int, updates: int, resumed: Resumed | None) -> None:
        """Move the schedule to a step. All schedules except plateau depend on the step count only."""
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

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that are trained."""
        model = self.task.get_trainable_module()
        assert model is not None
        return model.parameters()

    def distribute(self) -> None:
        """Wrap the model for training in several processes."""
        if self.group.is_distributed and not self.options.averaging.fsdp:
            ids = [self.group.device.index] if self.group.device.type == "cuda" else None
            self.task.prepare_distributed(device_ids=ids, broadcast_buffers=not self.options.averaging.no_ddp_bb)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a loss."""
        self.scaler.scale(loss).backward()

    def gradients(self) -> Iterator[Tensor]:
        """Yield the gradients that must be finite before a step; none with a loss scale, which handles overflow."""
        if not self.scaler.is_enabled():
            for parameter in self.parameters():
                if parameter.grad is not None:
                    yield parameter.grad

    def step(self) -> bool:
        """Advance optimizer, schedule and averaged weights; return True if the loss scale skipped the step."""
        self.updates += 1
        self.scheduler.step_update(self.updates)
        clip, mode = self.options.optimizer.clip_grad, self.options.optimizer.clip_mode
        if clip:
            self.scaler.unscale_(self.optimizer)
            parameters = list(self.task.get_clip_parameters(exclude_head=mode == "agc"))
            dispatch_clip_grad(parameters, clip, mode=mode)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.task.update_ema()
        return self.scaler.get_scale() < scale

    def models_on_device(self) -> dict[str, nn.Module]:
        """Return the model and its average, unless that is on the CPU, where it is slow and NCCL cannot reach it."""
        models: dict[str, Any] = {"raw": self.task.get_eval_model()}
        if self.task.has_ema() and not self.options.averaging.model_ema_force_cpu:
            models["averaged"] = self.task.get_eval_model(ema=True)
        return models

    # Saving

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, in types that load safely; collective."""
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
        return sharding.unsharded(state, self.group.is_first) if self.options.averaging.fsdp else state

    def buffers(self) -> dict[str, Tensor]:
        """Return batch statistics and other buffers, which differ between processes until the end of an epoch."""
        if not self.group.is_distributed:
            return {}
        return {name: buffer.cpu() for name, buffer in self._named_buffers().items()}

    def load_buffers(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the buffers that `buffers` returned."""
        own = self._named_buffers()
        for name in own.keys() & saved.keys():  # options can switch the average on or off
            own[name].copy_(saved[name])

    def _named_buffers(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind in ("model", "average") if self.task.has_ema() else ("model",):
            model = unwrap_model(self.task.get_eval_model(ema=kind == "average"))
            saved = model.state_dict().keys()  # others are constants
            found |= {f"{kind}.{name}": buffer for name, buffer in model.named_buffers() if name in saved}
        return found
