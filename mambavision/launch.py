"""How this process was started: alone, by torchrun (or torch.distributed.launch), or by Slurm's srun."""

import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed
from torch import Tensor

from mambavision import failure
from mambavision.errors import UserError

Launcher = Literal["none", "pytorch", "slurm"]

_GLOO_LETS_GO_SECONDS = 0.5


@dataclass(frozen=True)
class Process:
    """This process among all those of the program."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launcher: Launcher = "none"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1


def this_process(environment: Mapping[str, str] = os.environ) -> Process:
    """Read rank and world size from the variables of torchrun or, failing that, of a Slurm step.

    The batch script of a Slurm job also sees SLURM_PROCID and SLURM_NTASKS, but is a single process: only a numbered
    step (srun) with several tasks counts.

    Raises:
        UserError: The variables make no sense.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = _number("RANK", environment), _number("WORLD_SIZE", environment)
        local_rank = _number("LOCAL_RANK", environment) if "LOCAL_RANK" in environment else 0
        if rank >= world_size:
            raise UserError(
                f"RANK={rank} is not one of WORLD_SIZE={world_size} processes, counted from 0 on; start the program "
                "by torchrun or srun, or unset both variables to run it alone."
            )
        return Process(rank, local_rank, world_size, "pytorch")
    tasks = _number("SLURM_STEP_NUM_TASKS", environment) if "SLURM_STEP_NUM_TASKS" in environment else 1
    if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_ID", "").isdigit() and tasks > 1:
        rank, local_rank = _number("SLURM_PROCID", environment), _number("SLURM_LOCALID", environment)
        return Process(rank, local_rank, tasks, "slurm")
    return Process()


def _number(name: str, environment: Mapping[str, str]) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name}={value}: the variable must be a number from 0 on; unset it, or start by torchrun.")
    return int(value)


def set_rendezvous(process: Process, environment: dict[str, str] | os._Environ = os.environ) -> None:
    """Set the variables by which torch.distributed's processes find each other, where srun leaves them unset."""
    if process.launcher != "slurm":
        return
    is_one_machine = environment.get("SLURM_STEP_NUM_NODES") == "1"
    first_host = "127.0.0.1" if is_one_machine else _first_host(environment["SLURM_STEP_NODELIST"])
    environment.setdefault("MASTER_ADDR", first_host)
    identity = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(20000 + identity % 20000))
    environment.update(RANK=str(process.rank), LOCAL_RANK=str(process.local_rank), WORLD_SIZE=str(process.world_size))


def _first_host(node_list: str) -> str:
    """``gpu[03-05,9],cpu1`` -> ``gpu03``"""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", node_list)
    return match[1] + (match[2] or "")


def pick_device(name: str, process: Process) -> torch.device:
    """Return the device of this process: `name`, or a GPU if there is one, or the CPU.

    Raises:
        UserError: The device is not there.
    """
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(kind)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown device; use cuda, cuda:1, cpu, ...") from None
    # "meta" and others hold no numbers, or are not for computing.
    accelerators = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}
    if device.type not in (*accelerators, "cpu"):
        raise UserError(f"--device {name}: nothing can be computed there; use cuda, cuda:1, cpu, ...")
    count = accelerators[device.type].device_count() if device.type in accelerators else 1
    if count == 0:
        what = "GPU" if device.type == "cuda" else f"device of the kind {device.type}"
        raise UserError(f"--device {name}: no {what} is visible to PyTorch here; use --device cpu.")
    if device.index is not None and device.index >= count:
        raise UserError(f"--device {name}: there are only {count} here, counted from 0 on.")
    if device.type == "cuda":
        if process.is_distributed and device.index is None:
            device = torch.device("cuda", process.local_rank % count)
        elif device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
    return device


def join(process: Process, device: torch.device) -> None:
    """Join the process group, if there is more than one process.

    Raises:
        UserError: The processes cannot find each other, or there are more of them than GPUs.
    """
    if not process.is_distributed:
        return
    set_rendezvous(process)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={process.world_size} says that there are several processes, but not {' or '.join(missing)} "
            "where they find each other; start the program by torchrun or srun, or unset RANK and WORLD_SIZE."
        )
    store, *_ = next(torch.distributed.rendezvous("env://", process.rank, process.world_size))
    if device.type == "cuda":
        check_shares(process, f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}", store)
    failure.begin_watch(store, process.rank)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=process.rank,
        world_size=process.world_size,
        device_id=device if device.type == "cuda" else None,
    )


def check_shares(process: Process, gpu: str, store: torch.distributed.Store) -> None:
    """Raise a UserError on all processes if two of them have the same GPU: "HOST UUID" of that of this one."""
    store.set(f"gpu/{process.rank}", gpu)
    owner: dict[bytes, int] = {}
    for rank in range(process.world_size):
        other = owner.setdefault(store.get(f"gpu/{rank}"), rank)
        if other != rank:
            raise UserError(
                f"processes {other} and {rank} have the same GPU of {gpu.split()[0]}; start at most as many processes "
                "on each machine as it has GPUs, and give no number with --device."
            )


def any_process(flags: Sequence[bool] | Tensor, process: Process, device: torch.device) -> list[bool]:
    """Return for each of some flags whether it is set on any process; all processes must ask together."""
    if not process.is_distributed and not isinstance(flags, Tensor):
        return list(flags)
    together = torch.as_tensor(flags, dtype=torch.uint8, device=device)
    if process.is_distributed:
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in together.tolist()]


def leave(process: Process) -> None:
    """Leave the process group, all processes together."""
    if not process.is_distributed:
        return
    torch.distributed.barrier()
    failure.end_watch()
    if torch.distributed.get_backend() == "gloo":
        # Gloo's threads let go of the last collectives' tensors a little later, for which they need the interpreter's
        # lock. The group's destructor waits for them and holds that lock: a deadlock, unless they are done before.
        time.sleep(_GLOO_LETS_GO_SECONDS)
    torch.distributed.destroy_process_group()
