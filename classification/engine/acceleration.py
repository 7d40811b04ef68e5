"""Mixed precision and compilation of models."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.options.shared import SpeedOptions
from mambavision.errors import UserError
from mambavision.text import nearest

_logger = logging.getLogger(__name__)


def mixed_precision(options: SpeedOptions, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return the autocast context to run a model in."""
    if not options.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, amp_dtype_name(options, device)))


def amp_dtype_name(options: SpeedOptions, device: torch.device) -> str:
    """Return the type of mixed precision; the default on CPUs is bfloat16, because float16 is slow there."""
    return options.amp_dtype or ("float16" if device.type == "cuda" else "bfloat16")


def training_precision(amp: bool, bfloat: bool, device: torch.device) -> torch.dtype | None:
    """Return the type of train.py's mixed precision, or None if it is off."""
    if not amp:
        return None
    if bfloat:
        return torch.bfloat16
    if device.type == "cpu":
        _logger.info("mixed precision is off: float16 is slow on a CPU (use --amp --bfloat for bfloat16)")
        return None
    return torch.float16


def compiled(options: SpeedOptions, model: nn.Module) -> Callable[..., Any]:
    """Return the model, compiled if the options ask for it."""
    arguments = compile_arguments(options.torchcompile, options.torchcompile_mode)
    return torch.compile(model, **arguments) if arguments else model


def compile_arguments(backend: str | None, mode: str | None) -> dict[str, Any]:
    """Return the arguments of torch.compile, or none if nothing is to be compiled.

    Raises:
        UserError: torch has no such backend, or the mode belongs to another one.
    """
    if backend:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise UserError(f"--torchcompile {backend}: unknown backend.{nearest(backend, known)}")
    if mode is None:
        return {"backend": backend} if backend else {}
    if backend not in (None, "", "inductor"):
        raise UserError(
            f"--torchcompile-mode is for inductor, but --torchcompile names {backend}: leave out one of the two."
        )
    return {"backend": "inductor", "mode": mode}
