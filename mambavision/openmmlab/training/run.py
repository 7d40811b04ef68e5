"""Training and testing with mmengine's runner: what the programs of both OpenMMLab tasks have in common."""

import argparse
import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine import Config
from mmengine.dist import is_main_process
from mmengine.runner import CheckpointLoader, Runner

from mambavision.checkpoint import read_outline
from mambavision.errors import CheckpointError, Interruption, Preempted, UserError
from mambavision.files import check_writable, remove_temporaries
from mambavision.openmmlab.checkpoints import load_from_local
from mambavision.openmmlab.config import collect_log, explained, fit_to_machine, forget_pretrained, load_config, log_to
from mambavision.openmmlab.training.hooks import RECOVERY, OwnFolderHook
from mambavision.openmmlab.training.loops import use_exact_loops
from mambavision.openmmlab.weights import check_classes, check_some_weights, check_weights
from mambavision.running.folder_lock import FolderLock
from mambavision.running.group import by_first, join, leave
from mambavision.running.newest import STARTED, Position, new_start_number, newest_valid, number
from mambavision.running.process import Process, pick_device, this_process
from mambavision.running.ranges import check_ranges
from mambavision.running.record import NEVER, begin, finish, should_resume
from mambavision.running.signals import StopSignals
from mambavision.running.slurm import lock_patience, set_rendezvous

_logger = logging.getLogger(__name__)

AUTO = "auto"  # a value of --resume, as NEVER is
_ELSEWHERE = "or give another --work-dir"

DataCheck = Callable[[Config], None]


def _options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", help="folder for logs and checkpoints (default: work_dirs/NAME_OF_CONFIG)")
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings to override"
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm"],
        help="what started the processes (default: recognised from the environment)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # torch.distributed.launch
    return parser


def options_of_training(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _options("Train a model of OpenMMLab, on one CPU or many GPUs.")
    parser.add_argument("--amp", action="store_true", help="mixed precision, on a GPU")
    parser.add_argument(
        "--drop-path",
        dest="cfg_options",
        action="append",
        type="model.backbone.drop_path_rate={}".format,
        metavar="RATE",
        help="stochastic depth: short for --cfg-options model.backbone.drop_path_rate=RATE",
    )
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=AUTO,
        metavar="CHECKPOINT",
        help="go on from a checkpoint, or the newest readable one of a folder (default: of the work dir); a run that "
        "was preempted goes on unasked, unless this is 'never'",
    )
    return parser.parse_args(words)


def options_of_test(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _options("Score a checkpoint of a model of OpenMMLab.")
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument("--eval", nargs="+", metavar="METRIC", help="metrics instead of the config's")
    parser.add_argument("--out", help="where to write the predictions")
    parser.add_argument("--tta", action="store_true", help="average over flipped or scaled images")
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument("--show-dir", help="folder for pictures of the predictions")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds to show each picture")
    return parser.parse_args(words)


def train(args: argparse.Namespace, check_data: DataCheck) -> None:
    """Train as a config says.

    Args:
        args: From `options_of_training`.
        check_data: Raises a DataError if the data that a config names are not as they should be.
    """
    check_ranges(vars(args))
    config = _config(args, ("model", "train_dataloader", "train_cfg", "optim_wrapper"))
    given = copy.deepcopy(config)
    if args.amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise UserError(f"--auto-scale-lr: {args.config} does not say for which batch size its rate is meant.")
        config.auto_scale_lr.enable = True
    is_exact = use_exact_loops(config)
    if not is_exact:
        _logger.warning("%s: a training loop of its own, so this run cannot be left and continued exactly", args.config)
    resume = _resume_word(config, args)
    try:
        with (
            StopSignals() if is_exact else contextlib.nullcontext() as signals,
            _joined(args) as (process, device),
            FolderLock() as lock,
        ):
            claim = partial(lock.acquire, Path(config.work_dir), _ELSEWHERE, patience=lock_patience())
            by_first(claim, process, device)
            source, content = _starting_point(config, args)
            check_data(config)
            with explained(args.config):
                runner = _build_runner(config, process, device, given)
                _prepare_training(runner, resume, lock, signals)
                if config.resume:
                    check_weights(runner.model, content, source)
                    check_classes(runner.train_loop.dataloader.dataset, content, source)
                elif source:
                    check_some_weights(runner.model, content, source)
                del content
                runner.train()
                _forget_preemption(Path(runner.work_dir))
    except Preempted:
        raise
    except Interruption as interruption:
        interruption.advice = f"; go on with --resume (checkpoints are in {config.work_dir})"
        raise


def _prepare_training(runner: Runner, resume: str, lock: FolderLock, signals: StopSignals | None) -> None:
    """Let a run know how it was started, and how it may be left."""
    number = _take_over(Path(runner.work_dir), resume, is_new=not runner.cfg.resume)
    runner.register_hook(OwnFolderHook(number, lock), "VERY_HIGH")
    if signals is not None:
        runner.train_loop.signals = signals


def test(args: argparse.Namespace, check_data: DataCheck, adapt: Callable[[Config, argparse.Namespace], None]) -> None:
    """Score a checkpoint as a config says.

    Args:
        args: From `options_of_test`.
        check_data: As for `train`.
        adapt: Changes a config as the options ``eval``, ``out``, ``show_dir`` and ``tta`` demand, which differ between
            tasks.
    """
    check_ranges(vars(args))
    config = _config(args, ("model", "test_dataloader", "test_evaluator", "test_cfg"))
    given = copy.deepcopy(config)
    content = load_from_local(args.checkpoint)
    forget_pretrained(config)
    config.load_from = args.checkpoint
    if args.show or args.show_dir:
        if "visualization" not in config.get("default_hooks", {}):
            raise UserError(f"{args.config}: has no default_hooks.visualization, which --show and --show-dir need.")
        config.default_hooks.visualization.update(draw=True, show=args.show, wait_time=args.wait_time)
    check_data(config)
    adapt(config, args)
    with explained(args.config), _joined(args) as (process, device):
        runner = _build_runner(config, process, device, given)
        check_classes(runner.test_loop.dataloader.dataset, content, args.checkpoint)
        check_weights(runner.model, content, args.checkpoint)
        del content
        runner.test()


def _config(args: argparse.Namespace, needed: Sequence[str]) -> Config:
    collect_log()
    config = load_config(args.config, args.cfg_options)
    for key in needed:
        if not config.get(key):
            raise UserError(f"{args.config}: has no {key}; give a whole config, such as those in configs/mamba_vision.")
    if args.work_dir or not config.get("work_dir"):
        config.work_dir = args.work_dir or str(Path("work_dirs", Path(args.config).stem))
    check_writable(Path(config.work_dir, "last_checkpoint"))
    return config


def _starting_point(config: Config, args: argparse.Namespace) -> tuple[str | None, dict[str, Any] | None]:
    """Return path and content of the checkpoint to start or go on from, and let the config say which of both."""
    source, content = _to_resume(config, args) or (config.get("load_from"), None)
    config.resume = content is not None
    if config.resume:
        config.load_from = source
        if content["meta"].get("seed") is None:
            raise CheckpointError(
                f"{source}: does not say the seed of its training (meta.seed), so it cannot be resumed."
            )
        # mmengine restores the seed too late for the sampler.
        config.randomness = {**config.get("randomness", {}), "seed": content["meta"]["seed"]}
        forget_pretrained(config)
    elif source:
        content = CheckpointLoader.load_checkpoint(source, map_location="cpu")
    return source, content


def _to_resume(config: Config, args: argparse.Namespace) -> tuple[str, dict[str, Any]] | None:
    """Return the path and content of the checkpoint to go on from, if there is one."""
    work_dir, resume = Path(config.work_dir), _resume_word(config, args)
    found = _preempted(work_dir, resume)
    if found is None and resume in ("", NEVER):
        return None
    if found is None:
        folder = work_dir if resume == AUTO else Path(resume)
        is_file = resume != AUTO and not folder.is_dir()
        found = (folder, load_from_local(folder)) if is_file else newest_valid(_checkpoints(folder), _position)
    if found is None:
        _logger.warning("nothing to go on from in %s: training starts from the beginning", folder)
        return None
    path, content = found
    missing = {"meta", "state_dict", "optimizer", "message_hub"} - content.keys()
    if missing:
        raise CheckpointError(
            f"{path}: holds no training to go on with ({', '.join(sorted(missing))} missing); to start from its "
            f"weights, use --cfg-options load_from={path}."
        )
    _logger.info("goes on from %s", path)
    return str(path), content


def _preempted(work_dir: Path, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint of a run that goes on without being told to, and its content."""
    first_start = should_resume(work_dir, resume)
    if first_start is None:
        return None
    found = newest_valid(_checkpoints(work_dir), _position, first_start)
    if found is not None:
        _logger.info("this run was preempted, and goes on; to start anew, give --resume never")
    return found


def _resume_word(config: Config, args: argparse.Namespace) -> str:
    """Return what --resume says or, without it, what the config does in mmengine's way; empty for nothing."""
    if args.resume is None and config.get("resume"):
        return config.get("load_from") or AUTO
    return args.resume or ""


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a training, first the one that a preempted run left."""
    found = [*folder.glob(RECOVERY), *folder.glob("epoch_*.pth"), *folder.glob("iter_*.pth")]
    pointer = folder / "last_checkpoint"
    last = Path(pointer.read_text(encoding="utf-8").strip()) if pointer.is_file() else None
    if last is not None and last.is_file() and last.parent.resolve() != folder.resolve():  # a hook's out_dir
        found.append(last)
    return found


def _position(checkpoint: Mapping[str, Any]) -> Position:
    """Return what is greater for newer checkpoints: the start that wrote it, and its epoch and iteration."""
    info = _mapping(_mapping(checkpoint.get("message_hub")).get("runtime_info"))
    meta = _mapping(checkpoint.get("meta"))
    return number(info.get(STARTED)), number(meta.get("epoch")), number(meta.get("iter"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _take_over(work_dir: Path, resume: str, is_new: bool) -> float:
    """Delete what a killed run left half written and, where a new run starts, what a preempted one left.

    Returns:
        The number of this start.
    """
    if not is_main_process():
        return 0.0
    outlines = map(read_outline, _checkpoints(work_dir))
    start = new_start_number(_position(outline) for outline in outlines if outline is not None)
    remove_temporaries(work_dir)
    if is_new:
        (work_dir / RECOVERY).unlink(missing_ok=True)
    # What was there before a run that goes on from a file by name is not of that run; it may be of later iterations.
    is_from_file = resume not in ("", AUTO, NEVER) and should_resume(work_dir, resume) is None
    begin(work_dir, resume, is_new or is_from_file, number=start)
    return start


def _forget_preemption(work_dir: Path) -> None:
    if is_main_process():
        finish(work_dir)
        (work_dir / RECOVERY).unlink(missing_ok=True)


@contextlib.contextmanager
def _joined(args: argparse.Namespace) -> Iterator[tuple[Process, torch.device]]:
    """Join the group of processes, and leave it unless there is an error: the others would be waited for in vain."""
    process = _process(args)
    device = pick_device("", process)
    join(process, device)
    yield process, device
    leave(process)


def _build_runner(config: Config, process: Process, device: torch.device, given: Config) -> Runner:
    """Return the runner of a config on this machine, and keep the config as the user gave it in the work dir."""
    replaced = fit_to_machine(config, process, device)
    runner = Runner.from_cfg(config)
    if process.is_first:
        given.dump(Path(runner.work_dir, Path(given.filename).name))
    log_to(runner.logger)
    for sentence in dict.fromkeys(replaced):
        runner.logger.info(sentence)
    return runner


def _process(args: argparse.Namespace) -> Process:
    process = this_process()
    if args.launcher == "none":
        return Process()
    if args.launcher not in (None, process.launcher):
        start = "torchrun" if args.launcher == "pytorch" else "srun with several tasks"
        raise UserError(f"--launcher {args.launcher}: this process was not started by {start}; leave the option out.")
    set_rendezvous(process)  # mmengine asks for LOCAL_RANK
    return process
