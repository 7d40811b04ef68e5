"""The difference between the OpenMMLab tasks: their checks of the data, and their own steps from config to config."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmengine import Config

from mambavision.errors import UserError
from mambavision.openmmlab.training.config_steps import Step
from mambavision.openmmlab.training.options import TestOptions
from mambavision.text import nearest


@dataclass(frozen=True)
class Task:
    """The task-specific parts of training and scoring.

    Attributes:
        check_training_data: Raises a DataError for a data set of a config that cannot be trained on.
        check_test_data: The same for scoring.
        training_steps: Steps of train.py.
        test_steps: Returns the steps of test.py for its options.
    """

    check_training_data: Callable[[Config], None]
    check_test_data: Callable[[Config], None]
    training_steps: Sequence[Step]
    test_steps: Callable[[TestOptions], Sequence[Step]]


def check_metrics(given: Sequence[str] | None, known: Sequence[str]) -> None:
    """Raise a UserError for an unknown metric of ``--eval``."""
    for name in given or ():
        if name not in known:
            raise UserError(f"--eval {name}: unknown; choose from {', '.join(known)}.{nearest(name, known)}")
