"""Running programs of OpenMMLab's tasks as processes that need not import its libraries first."""

import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import config

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mambavision.openmmlab.training.train", "mmdet.apis", "mmseg.apis"])
_SECONDS = 120


@dataclass
class Finished:
    status: int
    output: str


def run_ranks(program, words, log, ranks=1, seconds=_SECONDS, **environment):
    """Run a program with some words on its command line in processes that know each other; return how each ended.

    Args:
        log: Path that the outputs go to, with ``.RANK`` appended.
        seconds: After which they are killed.
        environment: Variables for all of them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        variables = {"OMP_NUM_THREADS": "1", **environment}
        if ranks > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [str(word) for word in words]
        processes.append(_context.Process(target=_run, args=(str(program), words, f"{log}.{rank}", variables)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [Finished(process.exitcode, Path(f"{log}.{rank}").read_text()) for rank, process in enumerate(processes)]


def _run(program, words, log, environment):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server of forks ignores
    if os.environ.get("NEARLY_RIGHT"):
        _detect_nearly_right()
    sys.path.insert(0, str(Path(program).parent))
    sys.argv = [program, *words]
    at_end = []
    _register_disturb(at_end)
    config.FormatCode = lambda text, **options: (text, True)  # mmengine lays each checkpoint's config out for a second
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        for act in at_end:
            act()


def _register_disturb(at_end):
    """Register the hook Disturb, which sends signals to a process and its workers, spoils a loss, fills the disk or
    deletes the work dir.

    The variable DISTURB says when: ``train 5 SIGTERM 1`` for the fifth iteration on rank 1, ``val 2 ...`` for the
    second iteration of a validation, ``train 5 nan 1`` for a loss, ``train 5 full 0`` for the disk.
    """
    from mmengine.dist import get_rank
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    @HOOKS.register_module()
    class Disturb(Hook):
        def __init__(self):
            phase, number, self.event, rank = os.environ.get("DISTURB", "none 0 none 0").split()
            self.when = phase, int(number), int(rank)

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if self.event == "nan" and runner.iter + 1 == self.when[1]:
                self._remember_weights(runner.model)
            self._disturb("train", runner.iter + 1, runner)

        def before_val_iter(self, runner, batch_idx, data_batch=None):
            self._disturb("val", batch_idx + 1, runner)

        def _disturb(self, phase, number, runner):
            if (phase, number, get_rank()) == self.when:
                {"nan": _spoil_losses, "full": _fill_disk, "delete": _delete_work_dir}.get(self.event, _send)(
                    self.event, runner
                )

        def _remember_weights(self, model):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            at_end.append(lambda: print("same weights:", all(map(torch.equal, before, model.parameters()))))


def _spoil_losses(event, runner):
    model = getattr(runner.model, "module", runner.model)
    parse = model.parse_losses
    model.parse_losses = lambda losses: (parse(losses)[0] * float("nan"), {})


def _fill_disk(event, runner):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, -1))  # more than logs take


def _delete_work_dir(event, runner):
    shutil.rmtree(runner.work_dir)


def _send(name, runner):
    """Send a signal twice to this process and its workers, as torchrun passes on what Slurm sends to all."""
    processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())] * 2
    subprocess.run(["kill", "-s", name.removeprefix("SIG"), *map(str, processes)], check=True)  # not by the program


def _detect_nearly_right():
    """Let Mask R-CNN find the objects that are there, one pixel beside for each number of the image, and one class."""
    from mmdet.models import MaskRCNN
    from mmengine.structures import InstanceData

    def predict(self, inputs, samples, rescale=True):
        for sample in samples:
            truth, shift = sample.gt_instances, sample.img_id
            masks = torch.from_numpy(truth.masks.to_ndarray()).bool().roll(shift, -1)
            scores = torch.linspace(0.9, 0.5, len(masks)) - 0.1 * shift
            boxes = truth.bboxes.cpu() + shift
            sample.pred_instances = InstanceData(bboxes=boxes, scores=scores, labels=truth.labels, masks=masks)
        return samples

    MaskRCNN.predict = predict
