"""Building model, data, objective and schedule from the options of train.py, with every check that needs no work."""

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from typing import Any

import timm
import torch
from timm.data import FastCollateMixup, Mixup, resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import get_model_input_config, model_entrypoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import Dataset

from engine import data, loaders
from engine.execution import compile_options
from engine.task import MesaTask
from mambavision import create_model, load_checkpoint
from mambavision.errors import UserError, nearest
from mambavision.factory import check_model_name

_logger = logging.getLogger(__name__)

# What models raise for arguments of impossible types and values, which few of them check.
_IMPOSSIBLE_ARGUMENTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
_UNKNOWN_ARGUMENT = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def check_options(args: argparse.Namespace, device: torch.device) -> None:
    """Raise a UserError for options that do not go together."""
    check_model_name(args.model)
    data.check_options(args)
    is_stream = data.is_stream(args.dataset)
    mixing = mixup_is_on(args)
    distilled_on_cpu = args.model_ema_force_cpu and device.type != "cpu"
    problems = {
        "--mesa distils from the averaged weights: add --model-ema.": args.mesa and not args.model_ema,
        "--mesa needs the averaged weights on the GPU: drop --model-ema-force-cpu.": args.mesa and distilled_on_cpu,
        "--split-bn and --jsd-loss need --aug-splits of at least 2.": (args.split_bn or args.jsd_loss)
        and args.aug_splits < 2,
        "--aug-splits and mixup do not go together: add --mixup 0 --cutmix 0.": args.aug_splits and mixing,
        "--aug-splits needs the prefetcher: drop --no-prefetcher.": args.aug_splits and args.no_prefetcher,
        "--batch-size must be even for mixup; change it, or add --mixup 0 --cutmix 0.": mixing and args.batch_size % 2,
        "--aug-repeats and --aug-splits need single images: drop them, or choose another --dataset than a stream.": (
            is_stream and (args.aug_repeats or args.aug_splits)
        ),
        "--epoch-repeats does not reach wds/ streams: drop it.": (
            args.epoch_repeats and args.dataset.lower().startswith("wds/")
        ),
        "--warmup-prefix needs --epochs beyond --warmup-epochs: raise --epochs.": (
            args.warmup_prefix and args.warmup_epochs >= args.epochs
        ),
        "--log-wandb needs the package wandb: pip install wandb.": args.log_wandb and find_spec("wandb") is None,
    }
    for problem, present in problems.items():
        if present:
            raise UserError(problem)
    if args.opt.lower() not in timm.optim.list_optimizers():
        raise UserError(f"unknown optimizer --opt {args.opt}.{nearest(args.opt, timm.optim.list_optimizers())}")


def mixup_is_on(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def open_data(args: argparse.Namespace) -> tuple[Dataset, Dataset, list[str] | None]:
    """Return the training and validation data and the names of their classes, which must agree."""
    splits = ("train", "val") if args.lmdb_dataset else (args.train_split, args.val_split)
    if args.lmdb_dataset and "lmdb" in (args.data_dir or ""):
        raise UserError("--lmdb-dataset: LMDB files cannot be read; unpack them into the folders train/ and val/.")
    common = {
        "data_dir": args.data_dir,
        "dataset": args.dataset,
        "class_map": args.class_map,
        "channels": _channels(args) or 3,
        "download": args.dataset_download,
        "seed": args.seed,
        "exif_transpose": args.exif_transpose,
        "skip_corrupt": args.skip_corrupt,
    }
    train = data.open_split(
        split=splits[0], is_training=True, batch_size=args.batch_size, epoch_repeats=args.epoch_repeats, **common
    )
    validation = data.open_split(split=splits[1], batch_size=args.validation_batch_size or args.batch_size, **common)
    names = data.class_names(train)
    data.check_same_classes(names, data.class_names(validation), "the training data", "the validation data")
    return train, validation, names


def _channels(args: argparse.Namespace) -> int | None:
    """Return the channels that the options ask for; None for the model's own."""
    return args.model_kwargs.get("in_chans", args.input_size[0] if args.input_size else None)


def model_arguments(args: argparse.Namespace, classes: list[str] | None) -> dict[str, Any]:
    """Return the arguments that build the model again."""
    arguments = {
        "num_classes": args.num_classes or (len(classes) if classes else None),
        "in_chans": _channels(args),
        "drop_rate": args.drop_rate,
        "attn_drop_rate": args.attn_drop_rate,
        "drop_path_rate": args.drop_path,
        **args.model_kwargs,
    }
    if classes and arguments["num_classes"] < len(classes):
        raise UserError(
            f"--num-classes {arguments['num_classes']} is less than the {len(classes)} classes of the data."
        )
    return {key: value for key, value in arguments.items() if value is not None}


def build_model(args: argparse.Namespace, arguments: dict[str, Any]) -> nn.Module:
    """Create the model with its initial weights."""
    model = create_any(args.model, args.pretrained, arguments)
    if args.initial_checkpoint:
        report = load_checkpoint(model, args.initial_checkpoint, skip_head=args.skip_head, trust=args.trust_checkpoint)
        _logger.info("%s: %s", args.initial_checkpoint, report)
    if args.loadcheckpoint:
        report = load_checkpoint(model, args.loadcheckpoint, strict=False, trust=args.trust_checkpoint)
        _logger.info("%s: %s", args.loadcheckpoint, report)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if args.sync_bn and _can_synchronise():
        model = convert_sync_batchnorm(model)  # torch's own would lose the activations of timm's norm layers
    return model


def _can_synchronise() -> bool:
    """Alone there is nothing to synchronise with, and torch's layers do it on GPUs only."""
    return torch.distributed.is_initialized() and torch.cuda.is_available()


def create_any(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    """Create a model; arguments that it does not take are a UserError."""
    try:
        return create_model(name, pretrained=pretrained, **arguments)
    except _IMPOSSIBLE_ARGUMENTS as error:
        raise UserError(f"{name}: {_why_not_created(name, error)}") from error


def _why_not_created(name: str, error: Exception) -> str:
    message = str(error)
    unknown = _UNKNOWN_ARGUMENT.search(message)
    if not unknown:
        if isinstance(error, TypeError | ValueError):  # usually raised by a check, for users
            return f"{message}."
        reason = (message.strip() or type(error).__name__).splitlines()[0].rstrip(".")
        return f"cannot be created with these arguments ({reason})."
    model_class = vars(sys.modules[model_entrypoint(name).__module__]).get(unknown[1])
    known = signature(model_class).parameters if model_class else ()
    return f"got an unexpected keyword argument {unknown[2]!r}.{nearest(unknown[2], known)}"


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a model is meant for."""
    return get_model_input_config(model)["input_size"]


def set_image_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Let a model whose weights are for images of one (height, width) take those of another."""
    # Vision transformers and the like have it; others take any size.
    if hasattr(model, "set_input_size") and not getattr(model, "dynamic_img_size", False):
        model.set_input_size(img_size=size)


def data_config(model: nn.Module, options: Mapping[str, Any], use_test_size: bool = False) -> dict[str, Any]:
    """Return timm's data config: of the options, else the model's own, and always with the channels of the model.

    Args:
        model: The model.
        options: What of input_size, mean, std, crop_pct, crop_mode and interpolation should differ from its defaults.
        use_test_size: Prefer the size that the model is tested at, if it has one.

    Raises:
        UserError: The mean or std of the options is for another number of channels.
    """
    channels = input_size(model)[0]
    statistics = {key: tuple(options[key]) for key in ("mean", "std") if options.get(key)}
    for key, values in statistics.items():
        if len(values) not in (1, channels):
            raise UserError(f"--{key} has {len(values)} values, and the images have {channels} channels; give as many.")
    others = {key: value for key, value in options.items() if key not in statistics}
    config = resolve_data_config(others, model=model, use_test_size=use_test_size)
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        values = statistics.get(key, config[key])
        config[key] = tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
    return config


@dataclass
class Batches:
    """Where batches come from, and how they look."""

    train: loaders.TrainLoader
    validation: Any
    mixup: Mixup | None  # mixes on the training process; None if off or done while collating
    config: dict[str, Any]  # timm's data config of validation


def build_batches(
    args: argparse.Namespace,
    model: nn.Module,
    train: Dataset,
    validation: Dataset,
    device: torch.device,
    share: loaders.Share,
) -> Batches:
    """Create the loaders."""
    config = data_config(model, vars(args))
    # Worker processes are cheaper than the training process on a CPU; on a GPU, batches travel as bytes. The prefetcher
    # erases parts of mixed images, workers those of single ones.
    prefetch = (device.type != "cpu" or args.aug_splits > 1) and not args.no_prefetcher
    mixup = None
    if mixup_is_on(args):
        mixup = (FastCollateMixup if prefetch else Mixup)(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=model.num_classes,
        )
    common = {
        "workers": args.workers,
        "device": device,
        "share": share,
        "prefetch": prefetch,
        "pin_memory": args.pin_mem and device.type != "cpu",
    }
    train_batches = loaders.train_loader(
        train,
        config,
        {
            "no_aug": args.no_aug,
            "scale": args.scale,
            "ratio": args.ratio,
            "hflip": args.hflip,
            "vflip": args.vflip,
            "color_jitter": args.color_jitter,
            "auto_augment": args.aa or None,
            "interpolation": args.train_interpolation,
            "re_prob": args.reprob,
            "re_mode": args.remode,
            "re_count": args.recount,
        },
        batch_size=args.batch_size,
        seed=args.seed,
        collate_mixup=mixup if prefetch else None,
        aug_repeats=args.aug_repeats,
        aug_splits=args.aug_splits,
        erase_only_augmented=args.resplit,
        epoch_repeats=args.epoch_repeats,
        **common,
    )
    validation_batches = loaders.eval_loader(
        validation, config, batch_size=args.validation_batch_size or args.batch_size, **common
    )
    return Batches(train_batches, validation_batches, None if prefetch else mixup, config)


def build_task(args: argparse.Namespace, model: nn.Module, device: torch.device) -> ClassificationTask:
    """Create the objective, with averaged weights if they are wanted."""
    loss = {
        "loss_type": "jsd" if args.jsd_loss else "bce" if args.bce_loss else "ce",
        "smoothing": args.smoothing,
        "soft_targets": mixup_is_on(args),
        "bce_target_thresh": args.bce_target_thresh if args.bce_loss else None,
        "jsd_splits": args.aug_splits,
    }
    options = {"criterion_kwargs": loss, "device": device, "verbose": False}
    task = MesaTask(model, args.mesa, **options) if args.mesa else ClassificationTask(model, **options)
    if options := compile_options(args):
        task.compile(**options)
    if args.model_ema:
        on_cpu = torch.device("cpu") if args.model_ema_force_cpu else None
        task.setup_ema(decay=args.model_ema_decay, device=on_cpu)
    return task


_DEFAULT_LR = 1e-3
_ADAPTIVE = ("ada", "lamb")  # in the names of optimizers


def global_batch(args: argparse.Namespace, world_size: int) -> int:
    """Return how many images an optimizer step sees, over all processes."""
    return args.batch_size * args.grad_accum_steps * world_size


def learning_rates(args: argparse.Namespace, world_size: int) -> dict[str, float]:
    """Return lr, warmup_lr and min_lr, scaled to the global batch as in timm's training program.

    ``--lr`` is taken as it is. Otherwise ``--lr-base``, which is for batches of ``--lr-base-size``, is scaled by the
    ratio of the batches, or its square root.
    """
    bounds = {"warmup_lr": args.warmup_lr, "min_lr": args.min_lr}
    if args.lr is not None or args.lr_base is None:
        return {"lr": _DEFAULT_LR if args.lr is None else args.lr, **bounds}
    is_adaptive = any(part in args.opt.lower() for part in _ADAPTIVE)
    ratio = global_batch(args, world_size) / args.lr_base_size
    factor = ratio**0.5 if (args.lr_base_scale or ("sqrt" if is_adaptive else "linear")) == "sqrt" else ratio
    if args.lr_base_bounds:
        bounds = {name: rate * factor for name, rate in bounds.items()}
    return {"lr": args.lr_base * factor, **bounds}


def build_optimizer(args: argparse.Namespace, model: nn.Module, world_size: int = 1) -> torch.optim.Optimizer:
    """Create the optimizer.

    Raises:
        UserError: It does not take the options, for example another number of --opt-betas.
    """
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(_with_rates(args, world_size)))
    except _IMPOSSIBLE_ARGUMENTS as error:
        raise UserError(f"--opt {args.opt}: cannot be created with these options ({error}).") from error


def _with_rates(args: argparse.Namespace, world_size: int) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | learning_rates(args, world_size))


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, batches: int, world_size: int) -> Any:
    """Return timm's scheduler and the number of epochs, cool-down included.

    The schedule moves with every optimizer step, except with --lr-ep and for plateau, which waits for scores.
    """
    if args.data_len:
        batches = args.data_len // (args.batch_size * world_size)
    steps = max(1, -(-batches // args.grad_accum_steps))
    options = scheduler_kwargs(_with_rates(args, world_size)) | {
        "step_on_epochs": args.lr_ep or args.sched == "plateau"
    }
    if args.warmup_prefix:  # to timm, the length of the schedule is then that without the warm-up
        options["num_epochs"] -= args.warmup_epochs
    with warnings.catch_warnings():
        # timm says that it does not save the state of plateau schedules; the trainer does.
        warnings.filterwarnings("ignore", "PlateauLRScheduler is deprecated", FutureWarning)
        return create_scheduler_v2(optimizer, updates_per_epoch=steps, **options)
