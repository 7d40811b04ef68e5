"""Starting programs: alone, by torchrun, by srun, and by the shell scripts."""

import contextlib

import pytest
import torch

from mambavision.errors import UserError
from mambavision.running.group import Group, check_shares
from mambavision.running.process import Process, pick_device, this_process
from mambavision.running.slurm import set_rendezvous

STEP = {
    "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Process()),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, Process(3, 1, 4, "pytorch")),
        (STEP, Process(5, 1, 8, "slurm")),
        (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, Process(0, 0, 1, "pytorch")),  # torchrun inside a job
        ({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Process()),  # a batch script
        (STEP | {"SLURM_STEP_ID": "batch"}, Process()),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, Process()),
    ],
)
def test_launcher_is_recognised(environment, expected):
    assert this_process(environment) == expected


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 is not one of WORLD_SIZE=4 processes"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK=-1: the variable must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two: the variable must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK=: the variable must be a number"),
        (STEP | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x: the variable must be a number"),
    ],
)
def test_variables_that_make_no_sense_are_refused(environment, complaint):
    with pytest.raises(UserError, match=complaint):
        this_process(environment)


def test_processes_must_be_able_to_find_each_other(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(
        UserError,
        match=r"WORLD_SIZE=2 announces several processes, but MASTER_ADDR is not set, so they cannot find each other",
    ):
        Group(Process(1, 1, 2, "pytorch")).join()


@pytest.mark.parametrize(("gpus", "pair"), [("abc", None), ("aba", (0, 2)), ("bba", (0, 1))])
def test_processes_do_not_share_gpus(gpus, pair):
    store = torch.distributed.HashStore()
    for rank, gpu in enumerate(gpus):
        store.set(f"gpu/{rank}", f"n1 GPU-{gpu}")
    for rank, gpu in enumerate(gpus):
        with (
            pytest.raises(UserError, match="processes {} and {} use the same GPU of n1".format(*pair))
            if pair
            else (contextlib.nullcontext())
        ):
            check_shares(Process(rank, rank, 3), f"n1 GPU-{gpu}", store)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-04]", "gpu03"), ("n1,n2", "n1"), ("a[7,9-11],b", "a7"), ("alone", "alone"), ("rack1-n[2]", "rack1-n2")],
)
def test_processes_of_slurm_find_each_other(nodes, first):
    environment = STEP | {"SLURM_STEP_NODELIST": nodes}
    set_rendezvous(this_process(environment), environment)
    assert environment["MASTER_ADDR"] == first
    assert 20000 <= int(environment["MASTER_PORT"]) < 40000
    assert [environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["5", "1", "8"]
    alone = STEP | {"SLURM_STEP_NUM_NODES": "1"}
    set_rendezvous(this_process(alone), alone)
    assert alone["MASTER_ADDR"] == "127.0.0.1"
    chosen = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    set_rendezvous(this_process(chosen), chosen)
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "1")


def test_devices():
    assert pick_device("cpu", Process()) == torch.device("cpu")
    if not torch.cuda.is_available():
        assert pick_device("", Process()) == torch.device("cpu")
        with pytest.raises(UserError, match="no GPU is visible"):
            pick_device("cuda", Process())


# Several processes on one machine

# The shell scripts, with programs that show their arguments in place of Slurm's
