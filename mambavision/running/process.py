"""The current process among those of the program: started alone, by torchrun, or by Slurm's srun."""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from mambavision.errors import UserError

Launcher = Literal["none", "pytorch", "slurm"]

# Signals by which schedulers ask programs to stop; Windows lacks the second.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@dataclass(frozen=True)
class Process:
    """Rank of this process and number of processes."""

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
        UserError: The variables are invalid.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = _number("RANK", environment), _number("WORLD_SIZE", environment)
        local_rank = _number("LOCAL_RANK", environment) if "LOCAL_RANK" in environment else 0
        if rank >= world_size:
            raise UserError(
                f"RANK={rank} is not one of WORLD_SIZE={world_size} processes, counted from 0; start the program with "
                "torchrun or srun, or unset both variables to run it alone."
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
        raise UserError(f"{name}={value}: the variable must be a number from 0; unset it, or start with torchrun.")
    return int(value)


def pick_device(name: str, process: Process) -> torch.device:
    """Return the device of this process: `name`, or a GPU if there is one, or the CPU.

    Raises:
        UserError: There is no such device.
    """
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(kind)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown device; use cuda, cuda:1, cpu, ...") from None
    # "meta" and others hold no numbers or cannot compute.
    accelerators = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}
    if device.type not in (*accelerators, "cpu"):
        raise UserError(f"--device {name}: nothing can be computed there; use cuda, cuda:1, cpu, ...")
    count = accelerators[device.type].device_count() if device.type in accelerators else 1
    if count == 0:
        what = "GPU" if device.type == "cuda" else f"{device.type} device"
        raise UserError(f"--device {name}: no {what} is visible to PyTorch here; use --device cpu.")
    if device.index is not None and device.index >= count:
        raise UserError(f"--device {name}: there are only {count} here, counted from 0.")
    if device.type == "cuda":
        if process.is_distributed and device.index is None:
            device = torch.device("cuda", process.local_rank % count)
        elif device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
    return device
