"""The programs started alone, by torchrun, by srun, and as several processes of one machine."""

import json
import os
import socket
import subprocess
import sys

import pytest
from scoring import results, score

import mambavision
from checkout import ROOT
from entry_points import run
from small_models import SMALL
from small_runs import SETTING


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
    2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    3: [str(ROOT / "mambavision/running/start.py"), "3"],
}


def test_scores_do_not_depend_on_the_number_of_processes(digits, tmp_path, capsys):
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
    score(*words)
    result = results(capsys)
    scores = {1: [result["top1"], result["top5"], result["loss"]]}
    for count, processes in running.items():
        output, errors = processes.communicate(timeout=120)
        assert processes.returncode == 0, errors
        result = json.loads(output.split("--result\n")[1])
        scores[count] = [result["top1"], result["top5"], result["loss"]]
    assert 0 < scores[1][0] < 100
    assert scores[2] == pytest.approx(scores[1], abs=1e-6)
    assert scores[3] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.parametrize("program", ["train.py", "validate.py", "throughput.py", "predict.py picture.png"])
def test_unknown_backends_end_programs_before_they_start(program, tmp_path, monkeypatch, capsys):
    name, *words = program.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISION_KERNELS_BACKEND", "cudaa")
    with pytest.raises(SystemExit) as end:
        run(f"classification/{name}", monkeypatch, *words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: VISION_KERNELS_BACKEND: conv1d_silu=cudaa: this operator has the backends")
    assert not list(tmp_path.iterdir())


def _free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]
