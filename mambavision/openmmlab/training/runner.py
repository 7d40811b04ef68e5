"""mmengine's runner for a config on this machine, and the group of processes it runs in."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mmengine import Config
from mmengine.runner import Runner

from mambavision.errors import UserError
from mambavision.openmmlab.logs import log_to
from mambavision.openmmlab.training.config_steps import for_machine
from mambavision.running.group import Group
from mambavision.running.process import Launcher, Process, pick_device, this_process
from mambavision.running.slurm import set_rendezvous


@contextlib.contextmanager
def joined_group(launcher: Launcher | None) -> Iterator[Group]:
    """Join the group of processes; leave it unless there is an error."""
    process = _process(launcher)
    group = Group(process, pick_device("", process))
    group.join()
    yield group
    group.leave()


def _process(launcher: Launcher | None) -> Process:
    process = this_process()
    if launcher == "none":
        return Process()
    if launcher not in (None, process.launcher):
        expected = "torchrun" if launcher == "pytorch" else "srun with several tasks"
        raise UserError(f"--launcher {launcher}: this process was not launched by {expected}; leave the option out.")
    set_rendezvous(process)  # mmengine reads LOCAL_RANK
    return process


def build_runner(config: Config, group: Group, given: Config) -> Runner:
    """Return the runner of a config on this machine.

    Args:
        config: Config with all steps of the command line applied.
        group: All processes.
        given: The config as the user gave it, which is kept in the work dir.
    """
    config, replaced = for_machine(config, group)
    runner = Runner.from_cfg(config)
    if group.is_first:
        given.dump(Path(runner.work_dir, Path(given.filename).name))
    log_to(runner.logger)
    for sentence in replaced:
        runner.logger.info(sentence)
    return runner
