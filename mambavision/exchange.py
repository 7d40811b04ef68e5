"""Values that the processes of a run exchange; all of them take part."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from mambavision.launch import Process


def of_first(value: Any, process: Process, device: torch.device) -> Any:
    """Return the first process's value on all processes."""
    if not process.is_distributed:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=device)
    return values[0]


def of_all(value: Any, process: Process) -> list[Any]:
    """Return the values of all processes in their order."""
    if not process.is_distributed:
        return [value]
    values: list[Any] = [None] * process.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def mean(value: Tensor, process: Process) -> float:
    """Return the mean of a scalar over the processes."""
    if process.is_distributed:
        torch.distributed.all_reduce(value)
        value /= process.world_size
    return value.item()
