"""Slurm: rendezvous of the tasks of a step, restarts, and putting a job back into the queue."""

import logging
import os
import re
import subprocess
from collections.abc import Mapping

from mambavision.errors import UserError
from mambavision.running.process import Process

_logger = logging.getLogger(__name__)

_DEFAULT_REQUEUES = 100
_CONTROLLER_SECONDS = 60  # to wait for an answer
_LOCK_SECONDS = 120.0


def set_rendezvous(process: Process, environment: dict[str, str] | os._Environ = os.environ) -> None:
    """Set the variables by which the processes of torch.distributed find each other; srun does not set them.

    Raises:
        UserError: The step has no list of nodes.
    """
    if process.launcher != "slurm":
        return
    is_one_machine = environment.get("SLURM_STEP_NUM_NODES") == "1"
    host = "127.0.0.1" if is_one_machine else _first_host(environment.get("SLURM_STEP_NODELIST", ""))
    environment.setdefault("MASTER_ADDR", host)
    identity = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(20000 + identity % 20000))
    environment.update(RANK=str(process.rank), LOCAL_RANK=str(process.local_rank), WORLD_SIZE=str(process.world_size))


def _first_host(node_list: str) -> str:
    """``gpu[03-05,9],cpu1`` -> ``gpu03``"""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", node_list)
    if match is None:
        raise UserError(
            f"SLURM_STEP_NODELIST={node_list}: names no node, so the processes cannot find each other; set MASTER_ADDR "
            "to the name of the first node."
        )
    return match[1] + (match[2] or "")


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """Return the number of this job; empty outside of Slurm."""
    return environment.get("SLURM_JOB_ID", "")


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """Return how often Slurm has restarted this job."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def lock_patience(environment: Mapping[str, str] = os.environ) -> float:
    """Return how many seconds to wait for an earlier start to release the folder of the run.

    Slurm also restarts jobs whose machine has died, and a file server keeps the locks of a dead machine for a while.
    """
    return _LOCK_SECONDS if restarts(environment) > 0 else 0.0


def requeue(process: Process, environment: Mapping[str, str] = os.environ) -> bool:
    """Put the job of this process back into the queue; return whether that succeeded.

    Only the first process does it. MAX_REQUEUES in the environment limits how often (default 100), so that a run that
    makes no progress is not restarted forever. Only a job that is still running is requeued: one that is ending was
    cancelled, or reached its time limit without a warning, or was preempted by Slurm, which requeues it itself.
    """
    job = environment.get("SLURM_JOB_ID")
    if not process.is_first or job is None:
        return False
    limit = max_requeues(environment)
    if restarts(environment) >= limit:
        _logger.warning("job %s has been requeued %d times, and MAX_REQUEUES is %d: not requeued", job, limit, limit)
        return False
    try:
        state = _state(job)
        if state != "RUNNING":
            _logger.info("Slurm is ending job %s (%s): not requeued", job, state)
            return False
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        _logger.warning("Slurm does not requeue job %s (%s): submit it again", job, reason)
        return False
    _logger.info("job %s has been requeued", job)
    return True


def max_requeues(environment: Mapping[str, str] = os.environ) -> int:
    """Return how often a job may be requeued.

    Raises:
        UserError: MAX_REQUEUES is not a number.
    """
    value = environment.get("MAX_REQUEUES") or str(_DEFAULT_REQUEUES)
    if not value.isdecimal():
        raise UserError(f"MAX_REQUEUES={value}: the variable must be a number from 0, or unset.")
    return int(value)


def _state(job: str) -> str:
    """``... JobState=RUNNING Reason=...`` -> RUNNING"""
    found = re.search(r"\bJobState=(\w+)", _scontrol("show", "job", job))
    return found[1] if found else ""


def _scontrol(*words: str) -> str:
    answer = subprocess.run(
        ["scontrol", *words], check=True, capture_output=True, text=True, timeout=_CONTROLLER_SECONDS
    )
    return answer.stdout
