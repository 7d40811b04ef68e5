"""Starting programs: alone, by torchrun, by srun, and by the shell scripts."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, SETTING
from mambavision.errors import UserError
from mambavision.launch import Process, pick_device, set_rendezvous, this_process

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


def test_training_under_srun(digits, tmp_path):
    """Two processes that see what srun would tell them."""
    port = _free_port()
    shared = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    shared |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "classification/train.py"),
        *SETTING,
        "--epochs",
        "1",
        "--data-dir",
        str(digits),
    ]
    ranks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "cpu x 2" in outputs[0][0]
    assert "epoch" not in outputs[1][0]
    assert len(list(tmp_path.glob("output/train/exp/*"))) == 1


@pytest.mark.parametrize("program", ["train.py", "validate.py", "throughput.py", "predict.py picture.png"])
def test_unknown_backends_end_programs_before_they_start(program, run_program, tmp_path):
    name, *words = program.split()
    result = run_program(f"classification/{name}", *words, check=False, VISION_KERNELS_BACKEND="cudaa")
    assert result.returncode == 2
    assert result.stderr.startswith("error: VISION_KERNELS_BACKEND: conv1d_silu=cudaa: this operator has the backends")
    assert not list(tmp_path.iterdir())


def _free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


# The shell scripts, with programs that show their arguments in place of Slurm's


@pytest.fixture
def shell(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "basename", "dirname", "wc"):
        (tools / name).symlink_to(shutil.which(name))

    def fake(name, commands='printf "<%s>" "${0##*/}" "$@"'):
        (tools / name).write_text(f"#!{shutil.which('bash')}\n{commands}\n")
        (tools / name).chmod(0o755)

    def run(script, *words, folder="classification", **environment):
        environment = {"PATH": str(tools), "PYTHON": "python"} | environment
        command = ["bash", str(ROOT / folder / script), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)

    run.fake = fake
    return run


def test_scripts_run_a_program_where_there_is_no_slurm(shell):
    shell.fake("python")
    assert shell("train.sh", "--tag", "a b").stdout == "<python><-u><train.py><--tag><a b>"
    shown = shell("test.sh", "--checkpoint", "x", GPUS="4").stdout
    assert (
        shown == "<python><-m><torch.distributed.run><--standalone><--nproc-per-node><4><validate.py><--checkpoint><x>"
    )
    refused = shell("train.sh", NODES="2")
    assert refused.returncode == 2
    assert "NODES=2 needs Slurm" in refused.stderr


def test_scripts_submit_jobs(shell):
    shell.fake("sbatch")
    settings = {
        "NODES": "2",
        "PARTITION": "gpu",
        "ACCOUNT": "me",
        "TIME": "4:00:00",
        "SBATCH_OPTIONS": "--mem=0 --exclusive",
    }
    shown = shell("train.sh", "--tag", "a b", **settings).stdout
    for word in ("--nodes=2", "--ntasks-per-node=8", "--gres=gpu:8", "--job-name=train", "--partition=gpu",
                 "--account=me", "--time=4:00:00", "--mem=0", "--exclusive"):  # fmt: skip
        assert f"<{word}>" in shown
    assert f"<--chdir={ROOT / 'classification'}>" in shown
    wrapped = shown.split("--wrap=")[1]
    assert wrapped.startswith(
        "srun --nodes=2 --ntasks-per-node=8 --gres=gpu:8 --kill-on-bad-exit=1 --label python -u train.py"
    )
    assert r"--tag a\ b" in wrapped
    assert "<--gres" not in shell("train.sh", GPUS="0").stdout


def test_scripts_run_where_they_are_told_to(shell):
    shell.fake("sbatch")
    shell.fake("srun")
    shell.fake("python")
    for slurm in ({}, {"SLURM_JOB_ID": "1"}):
        assert shell("train.sh", "x", LAUNCH="local", **slurm).stdout == "<python><-u><train.py><x>"
    assert shell("train.sh", "x", LAUNCH="slurm").stdout.startswith("<sbatch>")
    refused = shell("train.sh", LAUNCH="here")
    assert (refused.returncode, refused.stderr) == (2, "error: LAUNCH=here is not known; use local or slurm\n")
    assert shell("train.sh", LAUNCH="local", NODES="2").returncode == 2


def test_refused_jobs_name_the_way_out(shell):
    shell.fake("sbatch", "echo 'sbatch: error: no partition' >&2; exit 1")
    refused = shell("train.sh", "x")
    assert refused.returncode == 1
    assert refused.stderr.endswith("error: sbatch did not take the job; with LAUNCH=local it runs on this machine\n")


def test_scripts_use_an_allocation(shell):
    shell.fake("srun")
    shown = shell("test.sh", "x", SLURM_JOB_ID="1", GPUS="2").stdout
    assert shown == "<srun><--nodes=1><--ntasks-per-node=2><--gres=gpu:2><--kill-on-bad-exit=1><--label>" \
        "<python><-u><validate.py><x>"  # fmt: skip


@pytest.mark.parametrize("folder", ["object_detection/tools", "semantic_segmentation/tools"])
def test_scripts_with_the_number_of_gpus(shell, folder):
    shell.fake("python")
    launcher = (
        "<python><-m><torch.distributed.run><--nnodes><{}><--node-rank><{}><--master-addr><{}><--master-port><{}>"
    )
    shown = shell("dist_train.sh", "a b.py", "1", folder=folder).stdout
    start = launcher.format(1, 0, "127.0.0.1", 29500)
    assert shown == f"{start}<--nproc-per-node><1><{ROOT / folder / 'train.py'}><a b.py>"
    words = ("config.py", "weights.pth", "8", "--cfg-options", "a='b c'")
    machines = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "PORT": "1234"}
    shown = shell("dist_test.sh", *words, folder=folder, **machines).stdout
    start = launcher.format(2, 1, "10.0.0.1", 1234)
    program = ROOT / folder / "test.py"
    assert shown == f"{start}<--nproc-per-node><8><{program}><config.py><weights.pth><--cfg-options><a='b c'>"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("dist_train.sh", "dist_train.sh needs at least 2 arguments: dist_train.sh CONFIG GPUS [OPTION ...]"),
        (
            "dist_test.sh a.py 8",
            "dist_test.sh needs at least 3 arguments: dist_test.sh CONFIG CHECKPOINT GPUS [OPTION ...]",
        ),
        (
            "dist_train.sh a.py --amp 8",
            "GPUS must be a number from 1 on, got --amp: dist_train.sh CONFIG GPUS [OPTION ...]",
        ),
        ("dist_train.sh a.py 0", "GPUS must be a number from 1 on, got 0: dist_train.sh CONFIG GPUS [OPTION ...]"),
    ],
    ids=str,
)
def test_scripts_say_what_they_need(shell, words, complaint):
    refused = shell(*words.split(), folder="object_detection/tools")
    assert (refused.returncode, refused.stderr, refused.stdout) == (2, f"error: {complaint}\n", "")
