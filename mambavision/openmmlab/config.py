"""Configs of OpenMMLab: read, overridden from the command line, and fitted to the machine at hand."""

import contextlib
import inspect
import logging
import re
import traceback
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from mmengine import Config, DictAction
from mmengine import registry as registries
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mambavision.errors import UserError
from mambavision.running.logs import EscapeOwnMessages, tolerate_write_errors
from mambavision.running.process import Process
from mambavision.text import nearest

# mmengine 0.10 finds bases like mmdet::... with it, and says so on each.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

_ESCAPE = EscapeOwnMessages()

# Keys at the top of a config that mean something, besides the runner's arguments and variables of the config itself.
_KEYS = {
    *inspect.signature(Runner).parameters,
    "auto_scale_lr",
    "compile",
    "custom_imports",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "tta_model",
    "tta_pipeline",
}


def load_config(path: str | Path, options: Sequence[str] = ()) -> Config:
    """Read a config file.

    Args:
        path: Config in Python's, YAML's or JSON's syntax.
        options: Settings that override it, as on the command line: ``["optim_wrapper.optimizer.lr=1e-3"]``.

    Raises:
        UserError: There is no such file, it is no config, or an option names nothing that exists.
    """
    path = Path(path)
    if not path.is_file():
        known = path.parent.glob("*.py") if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config file.{nearest(path.name, (other.name for other in known))}")
    try:
        config = Config.fromfile(path)
    except (OSError, SyntaxError, NameError, ImportError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a config: {error}.") from error
    overrides = _parsed(options)
    for key in overrides:
        first = key.split(".")[0]
        if first not in config and first not in _KEYS:
            raise UserError(f"--cfg-options {key}: the config has no {first!r}.{nearest(first, [*config, *_KEYS])}")
    try:
        config.merge_from_dict(overrides)
    except (KeyError, TypeError) as error:
        raise UserError(f"--cfg-options {' '.join(options)}: {error.args[0]}.") from error
    return config


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    for option in options:
        if "=" not in option:
            raise UserError(f"--cfg-options {option}: expected KEY=VALUE.")
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--options", nargs="+", action=DictAction, default={})
    return parser.parse_args(["--options", *options]).options if options else {}


def fit_to_machine(config: Config, process: Process, device: torch.device) -> list[str]:
    """Replace what works on GPUs only: synchronised batch norms, mixed precision, arguments of DDP.

    Returns:
        What was replaced that has a bearing on results, in sentences for the log.
    """
    replaced = []
    # Joined by mambavision.launch; mmengine only has to know that there are several processes.
    config.launcher = "pytorch" if process.is_distributed else "none"
    if device.type == "cpu":
        if process.is_distributed:  # a single process is mmengine's affair
            for setting in settings_in(config.model):
                if setting.get("type") == "SyncBN":
                    setting.type = "BN"
                    replaced.append("no GPU: batch norms are not synchronised")
            if config.pop("sync_bn", None):
                replaced.append("no GPU: batch norms are not synchronised")
        if config.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
            config.optim_wrapper.type = "OptimWrapper"
            for key in ("dtype", "loss_scale", "use_fp64"):
                config.optim_wrapper.pop(key, None)
            replaced.append("no GPU: training in float32 instead of mixed precision")
        unused = config.get("find_unused_parameters", False)
        wrapper = {"type": "MMDistributedDataParallel", "device_ids": None, "find_unused_parameters": unused}
        config.model_wrapper_cfg = wrapper
    return replaced


def forget_pretrained(config: Config) -> None:
    """Let a model whose weights are all going to be loaded be built without its pretrained ones."""
    for setting in settings_in(config.model):
        for key in ("pretrained", "init_cfg"):
            if setting.get(key) is not None:
                setting[key] = None


def settings_in(config: Any) -> Iterator[ConfigDict]:
    """Yield every dictionary in a config, outer ones first."""
    if isinstance(config, ConfigDict):
        yield config
    if isinstance(config, dict | list | tuple):
        for value in config.values() if isinstance(config, dict) else config:
            yield from settings_in(value)


@contextlib.contextmanager
def explained(source: str | Path) -> Iterator[None]:
    """Turn what a config's mistakes raise while its parts are built into a UserError; other errors pass.

    Args:
        source: Names the config in messages.
    """
    try:
        yield
    except (TypeError, KeyError, ValueError) as error:
        sentence = _explanation(error)
        if sentence is None:
            raise
        raise UserError(f"{source}: {sentence}") from error


def _explanation(error: Exception) -> str | None:
    message = str(error.args[0]) if error.args else ""
    if argument := re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message):
        kind = _class_built(argument[1], error)
        name = argument[1] if kind is None else kind.__name__
        return f"{name} has no argument {argument[2]!r}.{nearest(argument[2], _arguments(kind))}"
    if re.match(r"(\w+)\.__init__\(\) missing \d+ required .*", message):
        return f"{message}."
    if kind := re.match(r"(\S+) is not in the (\w+)::(.+?) registry", message):
        return f"there is no {kind[1]!r} in {kind[2]}'s registry of {kind[3]}s.{nearest(kind[1], _registered(kind[3]))}"
    return None


def _class_built(name: str, error: Exception) -> type | None:
    """Return the class that was being built: the one a constructor's error names, or one that derives from it."""
    if name == "DataLoader":
        return DataLoader
    built = [frame.f_locals.get("obj_cls") for frame, _ in traceback.walk_tb(error.__traceback__)]  # in mmengine
    classes = [kind for kind in built if inspect.isclass(kind) and name in (base.__name__ for base in kind.__mro__)]
    return classes[-1] if classes else None


def _arguments(kind: type | None) -> list[str]:
    """Return the arguments of a class and of those it derives from."""
    bases = inspect.getmro(kind)[:-1] if kind else ()
    return [name for base in bases for name in inspect.signature(base).parameters]


def _registered(name: str) -> list[str]:
    """Return what is in mmengine's registry of a name and in that of the library in use."""
    scope = DefaultScope.get_current_instance()
    found = []
    for registry in vars(registries).values():
        if isinstance(registry, Registry) and registry.name == name:
            child = registry.children.get(scope.scope_name) if scope is not None else None
            found += [*registry.module_dict, *(child.module_dict if child else ())]
    return found


def pipeline_owner(config: Config) -> ConfigDict:
    """Return the setting of the test data set that has the pipeline, the first if there are several.

    Raises:
        UserError: There is none.
    """
    owner = next((found for found in settings_in(config.get("test_dataloader")) if found.get("pipeline")), None)
    if owner is None:
        raise UserError(f"{config.filename}: has no pipeline in test_dataloader, which says how images are scaled.")
    return owner


def collect_log() -> None:
    """Keep this package's messages until `log_to`; without that, they are shown at the end of the program."""
    own = logging.getLogger("mambavision")
    shown_at_the_end = logging.StreamHandler()
    shown_at_the_end.addFilter(_ESCAPE)
    own.handlers[:] = [MemoryHandler(1000, flushLevel=logging.CRITICAL + 1, target=shown_at_the_end)]
    own.setLevel(logging.INFO)
    own.propagate = False


def log_to(logger: logging.Logger) -> None:
    """Send this package's messages, and those collected until now, where mmengine sends its own."""
    for handler in logger.handlers:
        tolerate_write_errors(handler)
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            handler.stream.reconfigure(encoding="utf-8")  # mmengine takes that of the locale
    own = logging.getLogger("mambavision")
    collected = [record for handler in own.handlers for record in getattr(handler, "buffer", ())]
    own.handlers[:] = logger.handlers
    for handler in own.handlers:
        handler.addFilter(_ESCAPE)
    for record in collected:
        own.handle(record)
