"""mmengine's runner for a config on this machine, and the group of processes it runs in."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from mmengine import Config
from mmengine.runner import Runner

from mambavision.errors import UserError
from mambavision.openmmlab.config import load_config
from mambavision.openmmlab.logs import collect_log, log_to
from mambavision.openmmlab.training.config_steps import for_machine
from mambavision.openmmlab.training.options import CommonOptions
from mambavision.running.group import Group
from mambavision.running.process import Launcher, Process, pick_device, this_process
from mambavision.running.ranges import check_ranges
from mambavision.running.slurm import set_rendezvous

Options = TypeVar("Options", bound=CommonOptions)


def read_config(options: Options, apply_options: Callable[[Config, Options], Config]) -> tuple[Config, Config]:
    """Read the config of a program, whose log lines are collected from here on.

    Args:
        options: Of the program.
        apply_options: Applies them to the config.

    Returns:
        The config with the options applied, and the config as the user gave it, to be kept in the same work dir.
    """
    check_ranges(vars(options))
    collect_log()
    config = load_config(options.config, options.cfg_options)
    given = copy.deepcopy(config)
    config = apply_options(config, options)
    given.work_dir = config.work_dir
    return config, given


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
