"""Checks of the options of train.py that need neither data nor a model."""

from importlib.util import find_spec

import timm.optim
import torch
from timm.data import create_transform

from engine.acceleration import compile_arguments
from engine.batches import mixup_is_on
from engine.data import check_data_options, is_stream
from engine.options import TrainOptions
from mambavision.errors import UserError
from mambavision.factory import check_model_name
from mambavision.running.group import Group
from mambavision.running.ranges import check_ranges
from mambavision.text import nearest


def check_options(options: TrainOptions, group: Group) -> None:
    """Raise a UserError for options of train.py that are invalid or cannot be combined."""
    check_ranges(options.flat())
    check_model_name(options.model.model)
    check_data_options(options.data.dataset, options.data.skip_corrupt, options.data.exif_transpose)
    compile_arguments(options.model.torchcompile, options.model.torchcompile_mode)
    _check_combinations(options, group.device)
    _check_sharding(options, group)
    _check_optimizer(options.optimizer.opt)
    _check_augmentation(options.augmentation.aa)


def _check_combinations(options: TrainOptions, device: torch.device) -> None:
    data, augmentation, averaging = options.data, options.augmentation, options.averaging
    schedule = options.schedule
    mixing = mixup_is_on(augmentation)
    has_splits = augmentation.aug_splits
    distilled_on_cpu = averaging.model_ema_force_cpu and device.type != "cpu"
    problems = {
        "--mesa distils from the averaged weights: add --model-ema.": averaging.mesa and not averaging.model_ema,
        "--mesa needs the averaged weights on the GPU: drop --model-ema-force-cpu.": averaging.mesa
        and distilled_on_cpu,
        "--split-bn and --jsd-loss need --aug-splits of at least 2.": (
            (averaging.split_bn or augmentation.jsd_loss) and has_splits < 2
        ),
        "--aug-splits and mixup cannot be combined: add --mixup 0 --cutmix 0.": has_splits and mixing,
        "--aug-splits needs the prefetcher: drop --no-prefetcher.": has_splits and data.no_prefetcher,
        "--batch-size must be even for mixup; change it, or add --mixup 0 --cutmix 0.": mixing
        and options.model.batch_size % 2,
        "--aug-repeats and --aug-splits need single images: drop them, or choose another --dataset than a stream.": (
            is_stream(data.dataset) and (augmentation.aug_repeats or has_splits)
        ),
        "--epoch-repeats has no effect on wds/ streams: drop it.": (
            data.epoch_repeats and data.dataset.lower().startswith("wds/")
        ),
        "--warmup-prefix needs more --epochs than --warmup-epochs: raise --epochs.": (
            schedule.warmup_prefix and schedule.warmup_epochs >= schedule.epochs
        ),
        "--log-wandb needs the package wandb: pip install wandb.": options.run.log_wandb and find_spec("wandb") is None,
    }
    for problem, present in problems.items():
        if present:
            raise UserError(problem)


def _check_optimizer(name: str) -> None:
    known = [str(optimizer) for optimizer in timm.optim.list_optimizers()]
    if name.lower() not in known:
        raise UserError(f"unknown optimizer --opt {name}.{nearest(name, known)}")


def _check_sharding(options: TrainOptions, group: Group) -> None:
    if not options.averaging.fsdp:
        return
    problems = {
        "shards the model across processes, and there is only one: start several (docs/guides/distributed.md) or drop "
        "it.": (not group.is_distributed),
        "needs bfloat16 in mixed precision, because processes could not agree on a loss scale: add --bfloat.": (
            options.run.amp and not options.run.bfloat
        ),
        "keeps its shard of the averaged weights on the model's device: drop --model-ema-force-cpu.": (
            options.averaging.model_ema_force_cpu
        ),
        "cannot be combined with --torchcompile: drop one of them.": (
            options.model.torchcompile or options.model.torchcompile_mode
        ),
        "cannot clip adaptively, because torch has no sharded operation for it: drop --clip-mode agc.": (
            options.optimizer.clip_mode == "agc"
        ),
    }
    for problem, present in problems.items():
        if present:
            raise UserError(f"--fsdp {problem}")


def _check_augmentation(policy: str) -> None:
    """Raise a UserError for an invalid policy, for which timm raises other errors."""
    try:
        create_transform(64, is_training=True, auto_augment=policy or None)
    except (AssertionError, KeyError, ValueError) as error:
        example = "such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0"
        raise UserError(f'--aa {policy}: {error}; give a policy of timm, {example}, or "" for none.') from error
