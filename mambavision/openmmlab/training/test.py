"""Scoring with mmengine's runner."""

import copy

from mambavision.openmmlab.checkpoints import load_from_local
from mambavision.openmmlab.config import explained, load_config
from mambavision.openmmlab.logs import collect_log
from mambavision.openmmlab.training.config_steps import apply, for_testing
from mambavision.openmmlab.training.options import TestOptions
from mambavision.openmmlab.training.runner import build_runner, joined_group
from mambavision.openmmlab.training.task import Task
from mambavision.openmmlab.weights import check_classes, check_weights
from mambavision.running.ranges import check_ranges


def test(options: TestOptions, task: Task) -> None:
    """Score a checkpoint according to a config."""
    check_ranges(vars(options))
    collect_log()
    config = load_config(options.config, options.cfg_options)
    given = copy.deepcopy(config)
    config = for_testing(config, options)
    given.work_dir = config.work_dir
    content = load_from_local(options.checkpoint)
    task.check_test_data(config)
    config = apply(config, *task.test_steps(options))
    with explained(options.config), joined_group(options.launcher) as group:
        runner = build_runner(config, group, given)
        check_classes(runner.test_loop.dataloader.dataset, content, options.checkpoint)
        check_weights(runner.model, content, options.checkpoint)
        del content
        runner.test()


test.__test__ = False  # type: ignore[attr-defined]  # no test, although pytest would collect it by its name
