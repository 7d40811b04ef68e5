"""Training whose processes each keep a part of the weights, gradients and optimizer state (PyTorch's FSDP2)."""

import argparse
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mambavision.errors import UserError
from mambavision.launch import Process

_BLOCK = re.compile(r"(^|\.)blocks\.\d+$")  # what is gathered at a time, in all models of this package and many of timm


def check_options(args: argparse.Namespace, process: Process) -> None:
    """Raise a UserError for what --fsdp cannot be combined with."""
    if not args.fsdp:
        return
    problems = {
        "shares the model among processes, and there is one: start several (see README.md), or drop it.": (
            not process.is_distributed
        ),
        "needs bfloat16 in mixed precision, as processes would not agree on a loss scale: add --bfloat.": (
            args.amp and not args.bfloat
        ),
        "keeps its part of the averaged weights where the model is: drop --model-ema-force-cpu.": (
            args.model_ema_force_cpu
        ),
        "cannot be combined with --torchcompile: drop one of them.": args.torchcompile or args.torchcompile_mode,
        "cannot clip by the norms of units, for which torch has no sharded operation: drop --clip-mode agc.": (
            args.clip_mode == "agc"
        ),
    }
    for problem, present in problems.items():
        if present:
            raise UserError(f"--fsdp {problem}")


def shard(task: TrainingTask, process: Process, device: torch.device) -> None:
    """Divide a task's model and its average among all processes; before the optimizer is made."""
    mesh = init_device_mesh(device.type, (process.world_size,))
    models = [task.get_trainable_module()]
    if task.has_ema():
        average = task.get_trainable_module(ema=True)
        average.foreach = False  # torch cannot mix sharded weights with whole buffers in one call
        models.append(average.module)
    for model in models:
        for name, module in list(model.named_modules()):
            if _BLOCK.search(name):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)


def whole(state: Any, keep: bool) -> Any:
    """Return a state dictionary with whole tensors on the CPU in place of parts; for all processes together.

    Args:
        state: Nested dictionaries and lists.
        keep: Whether this process needs them; the others get None in their place.
    """
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    return state


def sharded_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer with the parts of this process in place of the tensors that `whole` made."""
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    states = {
        index: {key: _part(value, parameters.get(index)) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": states}


def _part(value: Any, parameter: Tensor | None) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
