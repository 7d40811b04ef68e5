"""Command lines whose flags may also be given in a recipe.

A recipe is a flat YAML file whose keys are flags. It is converted to command-line words in front of the real ones, so
that types and choices are checked in one place and the command line wins. Flags may be spelled with ``-`` or ``_``.
"""

import argparse
import ast
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

# argparse's own pattern takes -1e-05 for a flag.
_NEGATIVE_NUMBER = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

Refused = dict[str, str]  # flag of the original programs -> why it is rejected and what to use

# Common names of flags that are spelled too differently for a similarity search.
_ALIASES = {
    "--learning-rate": "--lr",
    "--wd": "--weight-decay",
    "--batch": "--batch-size",
    "--bs": "--batch-size",
    "--optimizer": "--opt",
    "--drop-path-rate": "--drop-path",
    "--dropout": "--drop-rate",
    "--auto-augment": "--aa",
    "--grad-clip": "--clip-grad",
    "--ema": "--model-ema",
    "--warmup": "--warmup-epochs",
    "--bf16": "--bfloat",
    "--fp16": "--amp",
    "--cfg": "--model",
    "--resume": "--checkpoint",
}


# Only the user may trust a checkpoint, not a recipe from elsewhere.
_NO_TRUST = {"--trust-checkpoint": False, "--no-trust-checkpoint": True}


class _HelpFormatter(argparse.HelpFormatter):
    """Adds defaults to help where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_told = action.help is None or "default" in action.help
        if is_told or action.default in (None, False, "", argparse.SUPPRESS) or action.default in ([], {}):
            return action.help
        if isinstance(action.default, list):
            shown = " ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in action.default)
            return f"{action.help} (default: {shown})"
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Argument parser that accepts ``_`` for ``-``, explains refused flags and suggests the nearest known flag."""

    def __init__(self, refused: Refused, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.refused = refused
        self._negative_number_matcher = _NEGATIVE_NUMBER

    def parse_args(  # type: ignore[override]  # any namespace, as argparse itself, whose stubs have overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        words = self._switched([hyphenated(word) for word in (sys.argv[1:] if args is None else args)])
        for word in words:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag[2:] in self.refused:
                self.error(f"{flag} is not available: {self.refused[flag[2:]]}")
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            before = words[words.index(unknown[0]) - 1]
            switch = self._option_string_actions.get(before)
            if switch is not None and switch.nargs == 0 and not unknown[0].startswith("-"):
                self.error(f"{before} takes no value, got {unknown[0]!r}: {switch.help}")
            self.error(f"unknown argument {unknown[0]!r}.{self.did_you_mean(unknown[0].split('=')[0])}")
        return parsed

    def _switched(self, words: list[str]) -> list[str]:
        """Replace VMamba's ``--flag True`` and ``--flag False`` by ``--flag`` and ``--no-flag``."""
        found: list[str] = []
        for word in words:
            action = self._option_string_actions.get(found[-1]) if found else None
            if word.lower() in ("true", "false") and isinstance(action, Switch):
                if word.lower() == "false":
                    found[-1] = f"--no-{found[-1][2:]}"
            else:
                found.append(word)
        return found

    def did_you_mean(self, flag: str) -> str:
        known = self._option_string_actions
        alias = _ALIASES.get(flag, "")
        close = [alias] if alias in known else difflib.get_close_matches(flag, list(known), n=1, cutoff=0.5)
        return f" Did you mean {close[0]}?" if close else ""

    def error(self, message: str) -> NoReturn:
        """Exit with one sentence and status 2."""
        # `mambavision.text` would take seconds to import.
        shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in message)
        self.exit(2, f"error: {shown} (see {self.prog} --help)\n")

    def recipe_words(self, path: str) -> list[str]:
        """Convert a YAML recipe to command-line words."""
        try:
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"{path}: cannot be read as a YAML recipe ({' '.join(str(error).split())})")
        if not isinstance(recipe, dict):
            self.error(f"{path}: a recipe is a list of `flag: value` lines")
        for key, value in recipe.items():
            if value is not None and value != _NO_TRUST.get(hyphenated(f"--{key}"), value):
                self.error(f"{path}: {key} is accepted on the command line only, as it lets a checkpoint run any code")
        return [word for key, value in recipe.items() for word in self._words(path, str(key), value)]

    def _words(self, path: str, key: str, value: Any) -> list[str]:
        flag = "--" + key.replace("_", "-")
        if flag[2:] in self.refused:
            if value in (None, False, ""):
                return []
            self.error(f"{path}: {key} is not available: {self.refused[flag[2:]]}")
        action = self._option_string_actions.get(flag)
        if action is None:
            self.error(f"{path}: unknown key {key!r}.{self.did_you_mean(flag)}")
        if value is None:
            return []
        if action.nargs == 0:
            if not isinstance(value, bool):
                self.error(f"{path}: {key} must be true or false, got {value!r}")
            if isinstance(action, Switch):
                name = flag[2:].removeprefix("no-")
                is_on = value is (name == flag[2:])  # no_amp: false is amp: true
                return [f"--{name}" if is_on else f"--no-{name}"]
            return [flag] if value else []
        if isinstance(value, dict):
            return [flag, *(f"{name}={item!r}" for name, item in value.items())]
        if isinstance(value, list):
            return [flag, *map(str, value)]
        return [f"{flag}={value}"]


def hyphenated(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


class Switch(argparse.BooleanOptionalAction):
    """A flag that a recipe can turn on and the command line off again, with ``--no-...`` or the flag `off`."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, help: str, off: str | None, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.help = help  # argparse itself would add the default
        self._off = off
        if off is not None:
            self.option_strings = [*self.option_strings, off]

    def __call__(self, parser, namespace, values, option_string=None):
        is_off = option_string == self._off or (option_string or "").startswith("--no-")
        setattr(namespace, self.dest, not is_off)


class NotNeeded(argparse.Action):
    """Accepts a flag of the original programs that has no effect here: stores nothing and prints `help`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "default": argparse.SUPPRESS})

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"note: {option_string} is {self.help}", file=sys.stderr)


class KeyValues(argparse.Action):
    """``--flag a=1 b=2,3`` -> {"a": 1, "b": (2, 3)}; values are Python literals, or text if they are not."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = dict(getattr(namespace, self.dest) or {})
        for value in values:
            key, equals, text = value.partition("=")
            if not equals:
                parser.error(f"{option_string} takes name=value, got {value!r}")
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pairs[key] = text
        setattr(namespace, self.dest, pairs)
