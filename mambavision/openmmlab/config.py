"""Configs of OpenMMLab: reading, overriding from the command line, and explaining their mistakes."""

import contextlib
import inspect
import re
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine import Config, DictAction
from mmengine import registry as registries
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mambavision.errors import UserError
from mambavision.text import nearest

# Top-level keys with a meaning, besides the variables of the config itself.
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
        UserError: The file is missing or not a config, or an option names an unknown setting.
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


def settings_in(config: Any) -> Iterator[ConfigDict]:
    """Yield every dictionary in a config, outer ones first."""
    if isinstance(config, ConfigDict):
        yield config
    if isinstance(config, dict | list | tuple):
        for value in config.values() if isinstance(config, dict) else config:
            yield from settings_in(value)


@contextlib.contextmanager
def explained(source: str | Path) -> Iterator[None]:
    """Convert errors caused by mistakes in a config to a UserError; other errors propagate unchanged.

    Args:
        source: Name of the config in error messages.
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
    if found := re.match(r"(\S+) is not in the (\w+)::(.+?) registry", message):
        name, library, registry = found.groups()
        return f"there is no {name!r} in {library}'s registry of {registry}s.{nearest(name, _registered(registry))}"
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
    """Return the entries of mmengine's registry of a name and of the current library's."""
    scope = DefaultScope.get_current_instance()
    found = []
    for registry in vars(registries).values():
        if isinstance(registry, Registry) and registry.name == name:
            child = registry.children.get(scope.scope_name) if scope is not None else None
            found += [*registry.module_dict, *(child.module_dict if child else ())]
    return found


def pipeline_owner(config: Config) -> ConfigDict:
    """Return the first setting of the test data sets that has a pipeline.

    Raises:
        UserError: There is none.
    """
    owner = next((found for found in settings_in(config.get("test_dataloader")) if found.get("pipeline")), None)
    if owner is None:
        raise UserError(f"{config.filename}: has no pipeline in test_dataloader, which defines how images are scaled.")
    return owner
