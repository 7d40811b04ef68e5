"""train.py with two processes that learn together: what each of them sees, and models divided among them."""

import json
import os
import socket
import subprocess
import sys

import pytest

import mambavision
from checkout import ROOT
from engine.checks import check_options
from mambavision.checkpoint import read_checkpoint
from mambavision.errors import UserError
from mambavision.running.group import Group
from mambavision.running.process import Process
from small_models import SMALL
from small_runs import identical, weights


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """Where train_in_processes.py has run."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = str(server.getsockname()[1])
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    path = os.pathsep.join(
        [str(ROOT / "classification"), str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH", "")]
    )
    command = [
        sys.executable,
        str(ROOT / "tests/classification/programs/train_in_processes.py"),
        "--data-dir",
        str(digits),
        "--batch-size",
        "6",
    ]
    programs = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [program.communicate(timeout=300)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], "\n".join(said)
    return folder


@pytest.fixture(params=[0, 1], ids=["first", "second"])
def found(folder, request):
    """What a process found."""
    return json.loads((folder / f"{request.param}.json").read_text())


def test_loss_that_is_not_finite_stops_all_processes_at_the_same_step(found):
    poisoned = found["poisoned"]
    assert poisoned["end"].startswith(
        "NonFiniteError: the loss is not finite; stopped before the optimizer's step. Samples: process 1: digit "
    )
    assert "process 0: " not in poisoned["end"]
    assert poisoned["end"].count(".png") == 6
    assert "epoch 0, batch 3" in poisoned["end"]
    assert poisoned["steps"] == 3
    assert poisoned["kept"]


@pytest.mark.parametrize("kind", ["copied", "sharded"])
def test_interrupted_processes_end_like_undisturbed_ones(folder, found, kind):
    losses, end = found[kind]
    (before, left), (after, finished) = found[f"{kind}, left"], found[f"{kind}, on"]
    assert (end, finished) == ("", "")
    assert left in ("Preempted: ", "SystemExit: 75")
    assert 0 < len(before) < 10 == len(losses)
    assert before + after == losses
    runs = folder / "output/train/exp"
    for key in ("state_dict", "state_dict_ema"):
        assert identical(weights(runs / f"{kind}, left", key=key), weights(runs / kind, key=key))


def close(losses, others):
    assert len(losses) == len(others) > 0
    return losses == pytest.approx(others, abs=1e-5)


def test_sharded_model_learns_like_a_copied_one(found):
    assert close(found["sharded"][0], found["copied"][0])
    whole, part = found["copied, numbers"], found["sharded, numbers"]
    assert 0.45 * whole < part < 0.55 * whole


@pytest.mark.parametrize("kind", ["copied", "sharded"])
def test_each_goes_on_from_the_other(found, kind):
    losses, end = found[f"{kind}, from the other"]
    assert end == ""
    assert close(losses, found["copied"][0][-len(losses) :])


@pytest.mark.parametrize("model", ["vmamba_tiny_s1l8", "segman_encoder_t"])
def test_all_models_can_be_sharded(found, model):
    assert close(found[f"{model}, sharded"][0], found[f"{model}, copied"][0])


def test_sharded_runs_leave_usual_checkpoints(folder):
    path = folder / "output/train/exp/sharded/last.pth.tar"
    copied = read_checkpoint(folder / "output/train/exp/copied/last.pth.tar")
    sharded = read_checkpoint(path)
    assert sharded.keys() == copied.keys()
    shapes = [
        [{key: getattr(value, "shape", value) for key, value in state.items() if key != "step"} for state in states]
        for states in (each["optimizer"]["state"].values() for each in (sharded, copied))
    ]
    assert shapes[0] == shapes[1]
    for key in ("state_dict", "state_dict_ema"):
        shapes = [{name: value.shape for name, value in each[key].items()} for each in (sharded, copied)]
        assert shapes[0] == shapes[1]
    model = mambavision.create_model("mamba_vision_T", **SMALL["mamba_vision_T"] | {"num_classes": 3})
    for ema in (False, True):
        mambavision.load_checkpoint(model, path, ema=ema)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "shards the model across processes, and there is only one"),
        (["--amp"], "needs bfloat16 in mixed precision"),
        (["--model-ema", "--model-ema-force-cpu"], "drop --model-ema-force-cpu"),
        (["--torchcompile"], "cannot be combined with --torchcompile"),
        (["--clip-mode", "agc"], "drop --clip-mode agc"),
    ],
)
def test_what_sharding_cannot_do(training_options, words, message):
    process = Process(0, 0, 2, "pytorch") if words else Process()
    with pytest.raises(UserError, match=f"^--fsdp .*{message}"):
        check_options(training_options("--fsdp", *words), Group(process))
