"""Trainings of two processes, for test_train_in_processes.py: one start of the processes serves them all.

Every process writes to RANK.json in its working directory what each of its batches lost, and how each training ended.
"""

import json
import math
import os
import shutil
import signal
import sys

import torch
from timm.task import ClassificationTask
from torch.distributed.tensor import DTensor

from engine.options import TrainOptions
from engine.train import Trainer
from mambavision.errors import Preempted, UserError
from mambavision.running.group import Group
from mambavision.running.process import STOP_SIGNALS, this_process
from mambavision.running.signals import StopSignals
from small_runs import setting

GROUP = Group(this_process())
WORDS = sys.argv[1:]


def fit(*words, model="mamba_vision_T", before=lambda small: None):
    """Train; return the trainer, what each batch lost, and how it ended."""
    torch.manual_seed(0)
    losses, end = [], ""
    try:
        with StopSignals() as signals:
            small = Trainer(TrainOptions.parse([*setting(model), *WORDS, *words]), GROUP, signals)
            small.learner.task.register_forward_hook(lambda task, batch, result: losses.append(result["loss"].item()))
            before(small)
            small.fit()
    except (UserError, Preempted) as error:
        end = f"{type(error).__name__}: {error}"
        torch.distributed.barrier()
    return small, losses, end


def weights_of(small):
    return [parameter.detach().clone() for parameter in small.learner.task.get_trainable_module().parameters()]


def poisoned():
    """The fourth batch of the second process has no loss."""
    forward, batches, after = ClassificationTask.forward, [], []

    def spoil(self, images, targets):
        batches.append(None)
        result = forward(self, images, targets)
        is_bad = GROUP.rank == 1 and len(batches) == 4
        return result | {"loss": result["loss"] * (math.nan if is_bad else 1.0)}

    def watch(small):
        step = small.learner.step
        small.learner.step = lambda: (step(), after.append(weights_of(small)))[0]

    ClassificationTask.forward = spoil
    small, _, end = fit("--experiment", "poisoned", before=watch)
    ClassificationTask.forward = forward
    is_kept = all(torch.equal(now, then) for now, then in zip(weights_of(small), after[-1], strict=True))
    return {"end": end, "steps": len(after), "kept": is_kept}


def ask(at):
    """Send the second process a signal before one of its steps."""

    def watch(small):
        step, steps = small.learner.step, []

        def and_ask():
            steps.append(None)
            if len(steps) == at and GROUP.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return step()

        small.learner.step = and_ask

    return watch


def sharded_and_copied(found):
    full = ["--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "2", "--drop-path", "0.2"]
    for name, words in {"copied": [], "sharded": ["--fsdp"]}.items():
        _, *found[name] = fit(*full, *words, "--experiment", name)
        _, *found[f"{name}, left"] = fit(*full, *words, "--experiment", f"{name}, left", before=ask(3))
        if GROUP.is_first:
            shutil.copy(f"output/train/exp/{name}, left/recovery.pth.tar", f"{name}.pth.tar")
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        small, *found[f"{name}, on"] = fit(*full, *words, "--experiment", f"{name}, left")
        parts = [part.to_local() if isinstance(part, DTensor) else part for part in weights_of(small)]
        found[f"{name}, numbers"] = sum(part.numel() for part in parts)
    crossed = {"copied": ["--resume", "sharded.pth.tar"], "sharded": ["--fsdp", "--resume", "copied.pth.tar"]}
    for name, words in crossed.items():
        _, *found[f"{name}, from the other"] = fit(*full, *words, "--experiment", f"{name}, from the other")


def other_models(found):
    words = ["--epochs", "1", "--model-ema", "--mesa", "0.5", "--mesa-start-ratio", "-1", "--grad-checkpointing"]
    words += ["--clip-mode", "value", "--clip-grad", "0.01", "--no-saver"]
    for model in ("vmamba_tiny_s1l8", "segman_encoder_t"):
        _, *found[f"{model}, copied"] = fit(*words, model=model)
        _, *found[f"{model}, sharded"] = fit(*words, "--fsdp", model=model)


def main():
    GROUP.join()
    leave, GROUP.leave = GROUP.leave, torch.distributed.barrier  # the next training needs the others still
    found = {"poisoned": poisoned()}
    sharded_and_copied(found)
    other_models(found)
    with open(f"{GROUP.rank}.json", "w") as file:
        json.dump(found, file)
    leave()


if __name__ == "__main__":
    main()
