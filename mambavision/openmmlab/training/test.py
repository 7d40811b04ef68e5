"""Scoring with mmengine's runner."""

from mambavision.openmmlab.checkpoints import load_from_local
from mambavision.openmmlab.config import explained
from mambavision.openmmlab.training.config_steps import apply, for_testing
from mambavision.openmmlab.training.options import TestOptions
from mambavision.openmmlab.training.runner import build_runner, joined_group, read_config
from mambavision.openmmlab.training.task import Task
from mambavision.openmmlab.weights import check_classes, check_weights


def test(options: TestOptions, task: Task) -> None:
    """Score a checkpoint according to a config."""
    config, given = read_config(options, for_testing)
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
