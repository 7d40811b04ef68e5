"""Training with mmengine's runner."""

import contextlib
import logging
from functools import partial
from pathlib import Path

from mmengine.runner import CheckpointLoader, Runner

from mambavision.errors import Interruption, Preempted
from mambavision.openmmlab.config import explained
from mambavision.openmmlab.training import resume
from mambavision.openmmlab.training.config_steps import apply, at_start, for_training, has_exact_loops
from mambavision.openmmlab.training.hooks import OwnFolderHook
from mambavision.openmmlab.training.options import TrainOptions
from mambavision.openmmlab.training.runner import build_runner, joined_group, read_config
from mambavision.openmmlab.training.task import Task
from mambavision.openmmlab.weights import check_classes, check_some_weights, check_weights
from mambavision.running.folder_lock import FolderLock
from mambavision.running.signals import StopSignals
from mambavision.running.slurm import lock_patience

_logger = logging.getLogger(__name__)


def train(options: TrainOptions, task: Task) -> None:
    """Train according to a config."""
    config, given = read_config(options, for_training)
    is_exact = has_exact_loops(config)
    if not is_exact:
        _logger.warning(
            "%s: has its own training loop, so this run cannot be stopped and resumed exactly", options.config
        )
    requested = resume.requested(config, options.resume)
    work_dir = Path(config.work_dir)
    try:
        with (
            StopSignals() if is_exact else contextlib.nullcontext() as signals,
            joined_group(options.launcher) as group,
            FolderLock() as lock,
        ):
            claim = partial(lock.acquire, work_dir, "or give another --work-dir", patience=lock_patience())
            group.call_on_first(claim)
            source, resumed = resume.find(work_dir, requested) or (config.get("load_from"), None)
            content = resumed
            if source and content is None:
                content = CheckpointLoader.load_checkpoint(source, map_location="cpu")
            config = at_start(config, source, resumed)
            task.check_training_data(config)
            config = apply(config, *task.training_steps)
            with explained(options.config):
                runner = build_runner(config, group, given)
                _prepare(runner, requested, lock, signals)
                if resumed:
                    check_weights(runner.model, resumed, source)
                    check_classes(runner.train_loop.dataloader.dataset, resumed, source)
                elif source and content is not None:
                    check_some_weights(runner.model, content, source)
                del content, resumed
                runner.train()
                resume.end_record(Path(runner.work_dir))
    except Preempted:
        raise
    except Interruption as interruption:
        interruption.advice = f"; resume with --resume (checkpoints are in {config.work_dir})"
        raise


def _prepare(runner: Runner, requested: str, lock: FolderLock, signals: StopSignals | None) -> None:
    """Record how the run was started, and pass it the signals that stop it."""
    start = resume.begin_record(Path(runner.work_dir), requested, is_new=not runner.cfg.resume)
    runner.register_hook(OwnFolderHook(start, lock), "VERY_HIGH")
    if signals is not None:
        runner.train_loop.signals = signals
