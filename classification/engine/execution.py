"""How a model is run: its precision and its compilation, as the options ask."""

import argparse
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from mambavision.errors import UserError, nearest

_logger = logging.getLogger(__name__)


def mixed_precision(args: argparse.Namespace, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return the context in which to run the model."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, amp_dtype_name(args, device)))


def amp_dtype_name(args: argparse.Namespace, device: torch.device) -> str:
    """Return the reduced precision of --amp: float16 is slow on CPUs."""
    return args.amp_dtype or ("float16" if device.type == "cuda" else "bfloat16")


def training_precision(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """Return the reduced precision of train.py's --amp, or None for none."""
    if not args.amp:
        return None
    if args.bfloat:
        return torch.bfloat16
    if device.type == "cpu":
        _logger.info("mixed precision is off: float16 is slow on a CPU (use --amp --bfloat for bfloat16)")
        return None
    return torch.float16


def compiled(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """Return the model as --torchcompile and --torchcompile-mode want it run, or as it is without them."""
    options = compile_options(args)
    return torch.compile(model, **options) if options else model


def compile_options(args: argparse.Namespace) -> dict[str, str]:
    """Return the arguments of torch.compile, or none if nothing is to be compiled.

    Raises:
        UserError: torch has no such backend, or the mode is another one's.
    """
    if args.torchcompile:
        known = torch.compiler.list_backends(exclude_tags=())
        if args.torchcompile not in known:
            raise UserError(f"--torchcompile {args.torchcompile}: unknown backend.{nearest(args.torchcompile, known)}")
    if args.torchcompile_mode is None:
        return {"backend": args.torchcompile} if args.torchcompile else {}
    backend = args.torchcompile or "inductor"
    if backend != "inductor":
        raise UserError(f"--torchcompile-mode is inductor's, and --torchcompile names {backend}: give one of the two.")
    return {"backend": backend, "mode": args.torchcompile_mode}
