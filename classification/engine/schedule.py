"""Learning rate, optimizer and schedule of a training run."""

import argparse
import warnings
from typing import Any

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn

from engine.model import IMPOSSIBLE_ARGUMENTS
from engine.options import TrainOptions
from mambavision.errors import UserError

_DEFAULT_LR = 1e-3
_ADAPTIVE = ("ada", "lamb")  # in the names of optimizers


def global_batch(options: TrainOptions, world_size: int) -> int:
    """Return the number of images in an optimizer step, over all processes."""
    return options.model.batch_size * options.optimizer.grad_accum_steps * world_size


def learning_rates(options: TrainOptions, world_size: int) -> dict[str, float]:
    """Return lr, warmup_lr and min_lr, scaled to the global batch as in timm's training program.

    ``--lr`` is used unchanged. Otherwise ``--lr-base``, which is for batches of ``--lr-base-size``, is scaled by the
    ratio of the batches, or by its square root.
    """
    schedule = options.schedule
    bounds = {"warmup_lr": schedule.warmup_lr, "min_lr": schedule.min_lr}
    if schedule.lr is not None or schedule.lr_base is None:
        return {"lr": _DEFAULT_LR if schedule.lr is None else schedule.lr, **bounds}
    is_adaptive = any(part in options.optimizer.opt.lower() for part in _ADAPTIVE)
    ratio = global_batch(options, world_size) / schedule.lr_base_size
    factor = ratio**0.5 if (schedule.lr_base_scale or ("sqrt" if is_adaptive else "linear")) == "sqrt" else ratio
    if schedule.lr_base_bounds:
        bounds = {name: rate * factor for name, rate in bounds.items()}
    return {"lr": schedule.lr_base * factor, **bounds}


def build_optimizer(options: TrainOptions, model: nn.Module, world_size: int = 1) -> torch.optim.Optimizer:
    """Create the optimizer.

    Raises:
        UserError: It does not accept the options, for example a wrong number of --opt-betas.
    """
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(_for_timm(options, world_size)))
    except IMPOSSIBLE_ARGUMENTS as error:
        raise UserError(f"--opt {options.optimizer.opt}: cannot be created with these options ({error}).") from error


def build_scheduler(
    options: TrainOptions, optimizer: torch.optim.Optimizer, batches: int, world_size: int
) -> tuple[Any, int]:
    """Return timm's scheduler and the number of epochs, including the cool-down.

    The schedule advances with every optimizer step, except with --lr-ep and for plateau, which needs scores.

    Args:
        options: Options of train.py.
        optimizer: The optimizer whose learning rate is scheduled.
        batches: Number of batches of this process in an epoch.
        world_size: Number of processes.
    """
    schedule = options.schedule
    if options.data.data_len:
        batches = options.data.data_len // (options.model.batch_size * world_size)
    steps = max(1, -(-batches // options.optimizer.grad_accum_steps))
    arguments = scheduler_kwargs(_for_timm(options, world_size))
    arguments["step_on_epochs"] = schedule.lr_ep or schedule.sched == "plateau"
    if schedule.warmup_prefix:  # to timm, the length of the schedule then excludes the warm-up
        arguments["num_epochs"] -= schedule.warmup_epochs
    with warnings.catch_warnings():
        # timm warns that it does not save the state of plateau schedules; the trainer does.
        warnings.filterwarnings("ignore", "PlateauLRScheduler is deprecated", FutureWarning)
        return create_scheduler_v2(optimizer, updates_per_epoch=steps, **arguments)


def _for_timm(options: TrainOptions, world_size: int) -> argparse.Namespace:
    """Return the options under the names of timm's training program."""
    rates = learning_rates(options, world_size)
    return argparse.Namespace(**vars(options.optimizer) | vars(options.schedule) | rates)
