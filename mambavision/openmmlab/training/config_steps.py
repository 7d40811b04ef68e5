"""Steps that turn a config file into the config to run, in the order in which they are applied.

A step is a function from config to config. `for_training` and `for_testing` list the steps that follow from the command
line; `at_start` and `for_machine` list those that need to know the checkpoint, or the machine. The steps of one task
only are in `detection` and `segmentation` beside this module.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmengine import Config

from mambavision.errors import CheckpointError, UserError
from mambavision.files import check_writable
from mambavision.openmmlab.config import settings_in
from mambavision.openmmlab.training.options import CommonOptions, TestOptions, TrainOptions
from mambavision.running.group import Group

Step = Callable[[Config], Config]

EXACT_LOOPS = {"EpochBasedTrainLoop": "ExactEpochLoop", "IterBasedTrainLoop": "ExactIterLoop"}  # mmengine's -> ours


def for_training(config: Config, options: TrainOptions) -> Config:
    """Apply the command line of train.py."""
    return apply(
        config,
        partial(require, names=("model", "train_dataloader", "train_cfg", "optim_wrapper")),
        partial(set_work_dir, options=options),
        partial(use_mixed_precision, enabled=options.amp),
        partial(scale_learning_rate, enabled=options.auto_scale_lr),
        use_exact_loops,
    )


def for_testing(config: Config, options: TestOptions) -> Config:
    """Apply the command line of test.py."""
    return apply(
        config,
        partial(require, names=("model", "test_dataloader", "test_evaluator", "test_cfg")),
        partial(set_work_dir, options=options),
        drop_pretrained,
        partial(load_weights_of, checkpoint=options.checkpoint),
        partial(draw_predictions, options=options),
    )


def at_start(config: Config, source: str | None, resumed: dict[str, Any] | None) -> Config:
    """Start from the weights of a checkpoint, or resume it if its content is given."""
    if resumed is None:
        config.resume = False
        return config
    assert source is not None
    return apply(config, partial(resume, source=source, content=resumed), drop_pretrained)


def for_machine(config: Config, group: Group) -> tuple[Config, list[str]]:
    """Replace features that need GPUs: synchronised batch norms, mixed precision, arguments of DDP.

    Returns:
        The config, and sentences for the log about replacements that affect results.
    """
    replaced: list[str] = []
    # The processes are in a group already; mmengine only has to know that there are several.
    config.launcher = "pytorch" if group.is_distributed else "none"
    if group.device.type == "cpu":
        config = apply(
            config,
            partial(use_plain_batch_norms, is_distributed=group.is_distributed, replaced=replaced),
            partial(use_float32, replaced=replaced),
            wrap_for_cpu,
        )
    return config, list(dict.fromkeys(replaced))


def apply(config: Config, *steps: Step) -> Config:
    """Apply steps one after the other."""
    for step in steps:
        config = step(config)
    return config


# Steps


def require(config: Config, names: Sequence[str]) -> Config:
    """Raise a UserError unless the config has some settings."""
    for name in names:
        if not config.get(name):
            raise UserError(
                f"{config.filename}: has no {name}; give a complete config, such as those in configs/mamba_vision."
            )
    return config


def set_work_dir(config: Config, options: CommonOptions) -> Config:
    """Set ``work_dir`` to that of the command line or, without any, to ``work_dirs/NAME_OF_CONFIG``."""
    if options.work_dir or not config.get("work_dir"):
        config.work_dir = options.work_dir or str(Path("work_dirs", Path(options.config).stem))
    check_writable(Path(config.work_dir, "last_checkpoint"))
    return config


def use_mixed_precision(config: Config, enabled: bool) -> Config:
    """Train in mixed precision (``--amp``)."""
    if enabled:
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    return config


def scale_learning_rate(config: Config, enabled: bool) -> Config:
    """Scale the learning rate with the global batch size (``--auto-scale-lr``)."""
    if enabled:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise UserError(
                f"--auto-scale-lr: {config.filename} does not name the batch size of its learning rate "
                "(auto_scale_lr.base_batch_size)."
            )
        config.auto_scale_lr.enable = True
    return config


def use_exact_loops(config: Config) -> Config:
    """Replace mmengine's training loops and checkpoint hook by the ones that resume exactly."""
    loop = config.train_cfg
    if "by_epoch" in loop:
        loop.type = "EpochBasedTrainLoop" if loop.pop("by_epoch") else "IterBasedTrainLoop"
    loop.type = EXACT_LOOPS.get(_class_name(loop.get("type")), loop.get("type"))
    config.setdefault("default_hooks", {}).setdefault("checkpoint", {"type": "CheckpointHook"})
    hook = config.default_hooks.checkpoint
    if hook is not None and _class_name(hook.get("type")) == "CheckpointHook":
        hook.type = "SafeCheckpointHook"
    return config


def _class_name(kind: str | type | None) -> str:
    """``mmengine.CheckpointHook``, or the class itself -> ``CheckpointHook``"""
    return (kind if isinstance(kind, str) else getattr(kind, "__name__", "")).rpartition(".")[-1]


def has_exact_loops(config: Config) -> bool:
    """Return True if the training loop can stop after any step and resume exactly."""
    return config.train_cfg.type in EXACT_LOOPS.values()


def resume(config: Config, source: str, content: dict[str, Any]) -> Config:
    """Resume from a checkpoint, with its seed, which mmengine would restore too late for the sampler."""
    seed = content["meta"].get("seed")
    if seed is None:
        raise CheckpointError(
            f"{source}: does not contain the seed of its training (meta.seed), so it cannot be resumed."
        )
    config.resume, config.load_from = True, source
    config.randomness = {**config.get("randomness", {}), "seed": seed}
    return config


def drop_pretrained(config: Config) -> Config:
    """Drop pretrained settings; a checkpoint replaces every weight."""
    for setting in settings_in(config.model):
        for key in ("pretrained", "init_cfg"):
            if setting.get(key) is not None:
                setting[key] = None
    return config


def load_weights_of(config: Config, checkpoint: str) -> Config:
    """Load the weights of a checkpoint."""
    config.load_from = checkpoint
    return config


def draw_predictions(config: Config, options: TestOptions) -> Config:
    """Draw the predictions (``--show``, ``--show-dir``)."""
    if options.show or options.show_dir:
        if "visualization" not in config.get("default_hooks", {}):
            raise UserError(f"{config.filename}: has no default_hooks.visualization, which --show and --show-dir need.")
        config.default_hooks.visualization.update(draw=True, show=options.show, wait_time=options.wait_time)
    return config


def use_plain_batch_norms(config: Config, is_distributed: bool, replaced: list[str]) -> Config:
    """Replace synchronised batch norms, which need GPUs; mmengine does it itself for a single process."""
    if is_distributed:
        sentence = "no GPU: batch norms are not synchronised"
        for setting in settings_in(config.model):
            if setting.get("type") == "SyncBN":
                setting.type = "BN"
                replaced.append(sentence)
        if config.pop("sync_bn", None):
            replaced.append(sentence)
    return config


def use_float32(config: Config, replaced: list[str]) -> Config:
    """Replace mixed precision, which needs a GPU."""
    if config.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
        config.optim_wrapper.type = "OptimWrapper"
        for key in ("dtype", "loss_scale", "use_fp64"):
            config.optim_wrapper.pop(key, None)
        replaced.append("no GPU: training in float32 instead of mixed precision")
    return config


def wrap_for_cpu(config: Config) -> Config:
    """Let DistributedDataParallel work without GPUs."""
    unused = config.get("find_unused_parameters", False)
    wrapper = {"type": "MMDistributedDataParallel", "device_ids": None, "find_unused_parameters": unused}
    config.model_wrapper_cfg = wrapper
    return config
