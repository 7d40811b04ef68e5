"""Running programs of OpenMMLab's tasks as processes that need not import its libraries first."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mambavision.openmmlab.run", "mmdet.apis", "mmseg.apis"])
_SECONDS = 120


@dataclass
class Finished:
    status: int
    output: str


def run_ranks(program, words, log, ranks=1, **environment):
    """Run a program with some words on its command line in processes that know each other; return how each ended.

    Args:
        log: Path that the outputs go to, with ``.RANK`` appended.
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
        process.join(_SECONDS)
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
    _register_ask_to_leave()
    sys.path.insert(0, str(Path(program).parent))
    sys.argv = [program, *words]
    runpy.run_path(program, run_name="__main__")


def _register_ask_to_leave():
    """Register the hook AskToLeave, which sends a signal to its own process.

    The variable ASK says when: ``train 5 SIGTERM 1`` for the fifth iteration on rank 1, ``val 2 ...`` for the second
    iteration of a validation.
    """
    from mmengine.dist import get_rank
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    @HOOKS.register_module()
    class AskToLeave(Hook):
        def __init__(self):
            self.phase, number, name, rank = os.environ.get("ASK", "none 0 SIGTERM 0").split()
            self.number, self.signal, self.rank = int(number), getattr(signal, name), int(rank)

        def _ask(self, phase, number):
            if (phase, number, get_rank()) == (self.phase, self.number, self.rank):
                os.kill(os.getpid(), self.signal)

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self._ask("train", runner.iter + 1)

        def before_val_iter(self, runner, batch_idx, data_batch=None):
            self._ask("val", batch_idx + 1)
