"""The processes of a run: joining and leaving their group, and the values that they exchange."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from mambavision.errors import UserError
from mambavision.running import failure
from mambavision.running.process import Process
from mambavision.running.slurm import set_rendezvous

T = TypeVar("T")

_GLOO_RELEASE_SECONDS = 0.5


class Group:
    """The processes of a run, as seen from this one.

    Every method is collective: all processes must call it together. A single process creates no
    group of torch.distributed, and each method then returns its own value.

    Args:
        process: This process.
        device: Device for computation and collectives.
    """

    def __init__(self, process: Process | None = None, device: torch.device | None = None) -> None:
        self.process = process or Process()
        self.device = device or torch.device("cpu")

    @property
    def rank(self) -> int:
        return self.process.rank

    @property
    def size(self) -> int:
        return self.process.world_size

    @property
    def is_first(self) -> bool:
        return self.process.is_first

    @property
    def is_distributed(self) -> bool:
        return self.process.is_distributed

    def join(self) -> None:
        """Join the group, if there is more than one process.

        Raises:
            UserError: The processes cannot find each other, or there are more of them than GPUs.
        """
        process, device = self.process, self.device
        if not process.is_distributed:
            return
        set_rendezvous(process)
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"WORLD_SIZE={process.world_size} announces several processes, but {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set, so they cannot find each other; start the program "
                "with torchrun or srun, or unset RANK and WORLD_SIZE."
            )
        store, *_ = next(torch.distributed.rendezvous("env://", process.rank, process.world_size))
        if device.type == "cuda":
            gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
            check_shares(process, gpu, store)
        failure.begin_watch(store, process.rank)
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=process.rank,
            world_size=process.world_size,
            device_id=device if device.type == "cuda" else None,
        )

    def leave(self) -> None:
        """Leave the group. Do not call this after an error: the other processes would never arrive."""
        if not self.is_distributed:
            return
        torch.distributed.barrier()
        failure.end_watch()
        if torch.distributed.get_backend() == "gloo":
            # Gloo's threads release the tensors of the last collectives a little later, and need the interpreter's lock
            # for it. The group's destructor waits for them while holding that lock: a deadlock, unless they are done.
            time.sleep(_GLOO_RELEASE_SECONDS)
        torch.distributed.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value on all processes."""
        if not self.is_distributed:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def call_on_first(self, action: Callable[[], T]) -> T:
        """Call a function on the first process; return its result on all, or raise its UserError on all."""
        result = error = None
        if self.is_first:
            try:
                result = action()
            except UserError as raised:
                if not self.is_distributed:
                    raise
                error = raised
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes by rank."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def any(self, flags: Sequence[bool] | Tensor) -> list[bool]:
        """Return for each flag whether it is set on any process."""
        if not self.is_distributed and not isinstance(flags, Tensor):
            return list(flags)
        combined = torch.as_tensor(flags, dtype=torch.uint8, device=self.device)
        if self.is_distributed:
            torch.distributed.all_reduce(combined, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in combined.tolist()]

    def mean(self, value: Tensor) -> float:
        """Return the mean of a scalar over the processes; may overwrite it."""
        if self.is_distributed:
            torch.distributed.all_reduce(value)
            value /= self.size
        return value.item()


def check_shares(process: Process, gpu: str, store: torch.distributed.Store) -> None:
    """Raise a UserError on all processes if two of them use the same GPU.

    Args:
        process: This process.
        gpu: Its GPU, as "HOST UUID".
        store: Shared by all processes.
    """
    store.set(f"gpu/{process.rank}", gpu)
    owner: dict[bytes, int] = {}
    for rank in range(process.world_size):
        other = owner.setdefault(store.get(f"gpu/{rank}"), rank)
        if other != rank:
            raise UserError(
                f"processes {other} and {rank} use the same GPU of {gpu.split()[0]}; start at most as many processes "
                "on each machine as it has GPUs, and give no number with --device."
            )
