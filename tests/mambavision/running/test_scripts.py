"""The shell scripts, with programs that show their arguments in place of Slurm's."""

import shutil
import signal
import subprocess
import sys

import pytest

from checkout import ROOT


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
        ({"GPUS": "2", "PROCESSES": "4"}, "PROCESSES=4 is more than GPUS=2 of a machine"),
        ({"GPUS": "two"}, "GPUS=two is not valid"),
        ({"PROCESSES": "0"}, "PROCESSES=0 is not valid"),
        ({"NODES": "-1"}, "NODES=-1 is not valid"),
        ({"WARN": "soon"}, "WARN=soon is not a number of seconds"),
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
    assert (refused.returncode, refused.stderr) == (2, "error: LAUNCH=here is unknown; use local or slurm\n")
    assert shell("train.sh", LAUNCH="local", NODES="2").returncode == 2


def test_refused_jobs_name_the_way_out(shell):
    shell.fake("sbatch", "echo 'sbatch: error: no partition' >&2; exit 1")
    refused = shell("train.sh", "x")
    assert refused.returncode == 1
    assert refused.stderr.endswith("error: sbatch refused the job; use LAUNCH=local to run on this machine\n")


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
            "GPUS must be a number from 1, got --amp: dist_train.sh CONFIG GPUS [OPTION ...]",
        ),
        ("dist_train.sh a.py 0", "GPUS must be a number from 1, got 0: dist_train.sh CONFIG GPUS [OPTION ...]"),
    ],
    ids=str,
)
def test_scripts_say_what_they_need(shell, words, complaint):
    refused = shell(*words.split(), folder="object_detection/tools")
    assert (refused.returncode, refused.stderr, refused.stdout) == (2, f"error: {complaint}\n", "")
