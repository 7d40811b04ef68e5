"""Sharded training: each process keeps a part of the weights, gradients and optimizer state (PyTorch's FSDP2)."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mambavision.running.group import Group

_BLOCK = re.compile(r"(^|\.)blocks\.\d+$")  # gathered one at a time; in all models of this package and many of timm


def shard(task: TrainingTask, group: Group) -> None:
    """Shard a task's model and its average across all processes; before the optimizer is created."""
    mesh = init_device_mesh(group.device.type, (group.size,))
    models: list[Any] = [task.get_trainable_module()]
    if task.has_ema():
        average: Any = task.get_trainable_module(ema=True)
        average.foreach = False  # torch cannot mix sharded weights with whole buffers in one call
        models.append(average.module)
    for model in models:
        for name, module in list(model.named_modules()):
            if _BLOCK.search(name):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)


def unsharded(state: Any, keep: bool) -> Any:
    """Return a state dictionary with full tensors on the CPU instead of shards; collective.

    Args:
        state: Nested dictionaries and lists.
        keep: False returns None instead of each tensor: this process does not need them.
    """
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: unsharded(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [unsharded(value, keep) for value in state]
    return state


def sharded_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer with this process's shards instead of the tensors that `unsharded` returned."""
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    states = {
        index: {key: _shard_of(value, parameters.get(index)) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": states}


def _shard_of(value: Any, parameter: Tensor | None) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
