"""Starting programs: alone, by torchrun, by srun, and by the shell scripts."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch

import mambavision
from conftest import ROOT, SETTING, SMALL
from mambavision.errors import UserError
from mambavision.running.group import check_shares, join
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
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 says .* but not MASTER_ADDR where they find each other"):
        join(Process(1, 1, 2, "pytorch"), torch.device("cpu"))


@pytest.mark.parametrize(("gpus", "pair"), [("abc", None), ("aba", (0, 2)), ("bba", (0, 1))])
def test_processes_do_not_share_gpus(gpus, pair):
    store = torch.distributed.HashStore()
    for rank, gpu in enumerate(gpus):
        store.set(f"gpu/{rank}", f"n1 GPU-{gpu}")
    for rank, gpu in enumerate(gpus):
        with (
            pytest.raises(UserError, match="processes {} and {} have the same GPU of n1".format(*pair))
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


STARTS = {
    1: [],
    2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    3: [str(ROOT / "mambavision/running/start.py"), "3"],
}


def test_scores_do_not_depend_on_the_number_of_processes(digits, tmp_path):
    """Fifteen images in batches of four: eight and seven for two processes, five for each of three."""
    arguments = SMALL["mamba_vision_T"] | {"num_classes": 3}
    model = mambavision.create_model("mamba_vision_T", **arguments)
    content = {"arch": "mamba_vision_T", "model_kwargs": arguments, "state_dict": model.state_dict()}
    mambavision.save_checkpoint(content, tmp_path / "model.pth")
    words = ["--checkpoint", tmp_path / "model.pth", "--img-size", "32", "--data-dir", digits, "--device", "cpu"]
    words += ["--batch-size", "4", "--workers", "0"]
    program = str(ROOT / "classification/validate.py")
    running = {
        count: subprocess.Popen(
            [sys.executable, *start, program, *map(str, words)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for count, start in STARTS.items()
    }
    scores = {}
    for count, processes in running.items():
        output, errors = processes.communicate(timeout=120)
        assert processes.returncode == 0, errors
        result = json.loads(output.split("--result\n")[1])
        scores[count] = [result["top1"], result["top5"], result["loss"]]
    assert 0 < scores[1][0] < 100
    assert scores[2] == pytest.approx(scores[1], abs=1e-6)
    assert scores[3] == pytest.approx(scores[1], abs=1e-6)


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


# Several processes on one machine

REPORT = """
import os, signal, sys, time
signals = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))
rank = int(os.environ["RANK"])
if sys.argv[1] == "fail":
    if rank == 1:
        time.sleep(0.3)
        sys.exit(75)
    while not signals:
        time.sleep(0.01)
    sys.exit(3)
if sys.argv[1] == "die":
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
line = " ".join(os.environ[name] for name in names) + " " + " ".join(sys.argv[1:]) + "\\n"
os.write(1, line.encode())
while sys.argv[1] == "wait" and not signals:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(sum(signals))
"""


@pytest.fixture
def start(tmp_path):
    program = tmp_path / "report.py"
    program.write_text(REPORT)

    def begin(count, *words, **environment):
        command = [sys.executable, str(ROOT / "mambavision/running/start.py"), str(count), str(program), *words]
        environment = {"PATH": os.environ["PATH"]} | environment
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return begin


def test_processes_are_told_who_they_are(start):
    output, errors = start(2, "a b", "c", MASTER_ADDR="elsewhere", PORT="1").communicate(timeout=60)
    first, second = sorted(line.split() for line in output.splitlines())
    port = first.pop(5)
    assert second.pop(5) == port
    assert 0 < int(port) < 2**16
    assert first == ["0", "0", "2", "2", "127.0.0.1", "1", "a", "b", "c"]
    assert second == ["1", "1", "2", "2", "127.0.0.1", "1", "a", "b", "c"]
    assert errors == ""
    second_machine = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "OMP_NUM_THREADS": "4"}
    output, _ = start(2, "x", **second_machine).communicate(timeout=60)
    assert sorted(output.splitlines()) == ["2 0 4 2 10.0.0.1 29500 4 x", "3 1 4 2 10.0.0.1 29500 4 x"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_passed_on_once(start, number):
    program = start(2, "wait")
    assert program.stdout.readline()
    assert program.stdout.readline()
    program.send_signal(number)
    program.communicate(timeout=60)
    assert program.returncode == number


def test_status_is_that_of_the_first_to_fail(start):
    program = start(3, "fail")
    program.communicate(timeout=60)
    assert program.returncode == 75


def test_killed_processes_are_named(start):
    program = start(1, "die")
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 128 + signal.SIGKILL
    assert errors == "error: process 0 of this machine was ended by SIGKILL\n"


@pytest.mark.parametrize(
    ("machines", "complaint"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR, the address of the first machine"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 is not one of NNODES=1 machines, counted from 0 on"),
    ],
)
def test_machines_that_do_not_fit_are_refused(start, machines, complaint):
    program = start(1, "x", **machines)
    _, errors = program.communicate(timeout=60)
    assert (program.returncode, errors) == (2, f"error: {complaint}\n")


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
    assert shown == "<python><../mambavision/running/start.py><4><validate.py><--checkpoint><x>"
    refused = shell("train.sh", NODES="2")
    assert refused.returncode == 2
    assert "NODES=2 needs Slurm" in refused.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_signals_to_scripts_reach_the_program(shell, processes, tmp_path):
    """By the process number of the script, as that of a background job is known."""
    program = tmp_path / "tools" / "python"
    program.write_text(
        f"#!{sys.executable}\nimport os, signal, sys\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "print(os.getpid(), flush=True)\nsignal.pause()\n"
    )
    program.chmod(0o755)
    command = ["bash", str(ROOT / "classification/train.sh")]
    environment = {"PATH": str(program.parent), "PYTHON": "python", "PROCESSES": str(processes)}
    script = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert int(script.stdout.readline()) == script.pid
    script.send_signal(signal.SIGUSR1)
    assert script.wait(60) == 75


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"GPUS": "2", "PROCESSES": "4"}, "PROCESSES=4 are more than GPUS=2 of a machine"),
        ({"GPUS": "two"}, "GPUS=two is not a number that works here"),
        ({"PROCESSES": "0"}, "PROCESSES=0 is not a number that works here"),
        ({"NODES": "-1"}, "NODES=-1 is not a number that works here"),
        ({"WARN": "soon"}, "WARN=soon is no number of seconds"),
    ],
)
def test_counts_that_do_not_fit_are_refused(shell, settings, complaint):
    for program in ("python", "sbatch"):
        shell.fake(program)
        refused = shell("train.sh", **settings)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert complaint in refused.stderr


def test_scripts_submit_jobs(shell):
    shell.fake("sbatch")
    settings = {
        "NODES": "2",
        "CPUS": "12",
        "PARTITION": "gpu",
        "ACCOUNT": "me",
        "TIME": "4:00:00",
        "SBATCH_OPTIONS": "--mem=0 --exclusive",
    }
    shown = shell("train.sh", "--tag", "a b", **settings).stdout
    for word in ("--nodes=2", "--ntasks-per-node=8", "--gres=gpu:8", "--cpus-per-task=12", "--job-name=train",
                 "--partition=gpu", "--account=me", "--time=4:00:00", "--mem=0", "--exclusive"):  # fmt: skip
        assert f"<{word}>" in shown
    assert f"<--chdir={ROOT / 'classification'}>" in shown
    wrapped = shown.split("--wrap=")[1]
    assert wrapped.startswith(
        "srun --nodes=2 --ntasks-per-node=8 --gres=gpu:8 --cpus-per-task=12 --kill-on-bad-exit=1 --label python -u "
        "train.py"
    )
    assert r"--tag a\ b" in wrapped
    assert "<--gres" not in shell("train.sh", GPUS="0").stdout


def test_jobs_of_training_are_queued_again(shell):
    shell.fake("sbatch")
    shown = shell("train.sh").stdout
    assert "<--open-mode=append><--requeue><--signal=USR1@120>" in shown
    assert "<--requeue><--signal=USR1@600>" in shell("train.sh", WARN="600").stdout
    assert "--signal" not in shell("train.sh", WARN="0").stdout
    shown = shell("test.sh").stdout
    assert "--requeue" not in shown
    assert "--signal" not in shown
    for folder in ("object_detection/tools", "semantic_segmentation/tools"):
        assert "<--signal=USR1@120>" in shell("train.sh", "config.py", folder=folder).stdout


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
    allocation = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    shown = shell("test.sh", **allocation).stdout
    assert shown.startswith("<srun><--nodes=2><--ntasks-per-node=4><--gres=gpu:4>")
    shell.fake("python")
    assert shell("test.sh", LAUNCH="local", PROCESSES="1", **allocation).stdout == "<python><-u><validate.py>"


@pytest.mark.parametrize("folder", ["object_detection/tools", "semantic_segmentation/tools"])
def test_scripts_with_the_number_of_gpus(shell, folder):
    shell.fake("python")
    launcher = f"<python><{ROOT / folder}/../../mambavision/running/start.py>"
    shown = shell("dist_train.sh", "a b.py", "1", folder=folder).stdout
    assert shown == f"{launcher}<1><{ROOT / folder / 'train.py'}><a b.py>"
    words = ("config.py", "weights.pth", "8", "--cfg-options", "a='b c'")
    shown = shell("dist_test.sh", *words, folder=folder).stdout
    program = ROOT / folder / "test.py"
    assert shown == f"{launcher}<8><{program}><config.py><weights.pth><--cfg-options><a='b c'>"


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
