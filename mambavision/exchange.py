"""Values that the processes of a run exchange; all of them take part."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from mambavision.errors import UserError
from mambavision.launch import Process

T = TypeVar("T")


def of_first(value: Any, process: Process, device: torch.device) -> Any:
    """Return the first process's value on all processes."""
    if not process.is_distributed:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=device)
    return values[0]


def by_first(action: Callable[[], T], process: Process, device: torch.device) -> T:
    """Let the first process do something; return its result on all processes, or raise its UserError on all."""
    result = error = None
    if process.is_first:
        try:
            result = action()
        except UserError as raised:
            if not process.is_distributed:
                raise
            error = raised
    result, error = of_first((result, error), process, device)
    if error is not None:
        raise error
    return result


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
