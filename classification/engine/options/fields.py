"""Options as dataclasses: flags, help, YAML checks and defaults follow from the fields.

An option is a field made by `option`; a group of options is a dataclass of such fields; the options of a program are a
`ProgramOptions` whose fields are groups. This module avoids heavy imports, so that ``--help`` and usage errors appear
at once.
"""

import argparse
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from engine.options.parser import KeyValues, NotNeeded, Parser, Refused, Switch, hyphenated

Self = TypeVar("Self", bound="ProgramOptions")

_CONFIG = "config"  # the field that names a recipe


def option(
    default: Any,
    *aliases: str,
    help: str,
    off: str | None = None,
    positional: bool = False,
    plain: bool = False,
    **argument: Any,
) -> Any:
    """Declare an option as a dataclass field.

    The flag is the field's name with hyphens. A bool is a switch with a ``--no-`` form, a Literal gives the choices, a
    list takes one or more values, and a dict takes NAME=VALUE words.

    Args:
        default: Default value.
        aliases: Additional names of the flag.
        help: Help text.
        off: Further flag that turns a switch off.
        positional: The option is an argument without a flag.
        plain: A bool has no ``--no-`` form.
        argument: Passed on to ``add_argument``, for example ``metavar``, ``nargs`` or ``type``.
    """
    details = {"aliases": aliases, "help": help, "off": off, "positional": positional, "plain": plain, **argument}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=details)
    return dataclasses.field(default=default, metadata=details)


def group(options: type, title: str) -> Any:
    """Declare a group of options, a dataclass, as a field of a program's options."""
    return dataclasses.field(default_factory=options, metadata={"title": title})


def hidden(default: Any = None) -> Any:
    """Declare an option that ``--help`` does not show."""
    return option(default, help=argparse.SUPPRESS)


@dataclasses.dataclass
class ProgramOptions:
    """Options of a program, in groups.

    Attributes:
        description: First lines of ``--help``.
        refused: Flags of the original programs that are rejected, with the reason and the remedy.
        not_needed: Flags of the original programs that are accepted without effect: flag -> (nargs, reason).
    """

    description: ClassVar[str]
    refused: ClassVar[Refused] = {}
    not_needed: ClassVar[Mapping[str, tuple[int | None, str]]] = {}

    @classmethod
    def parser(cls) -> Parser:
        """Return the program's argument parser."""
        positional = "".join(
            f" [{field.metadata['metavar']}]"
            if field.metadata.get("nargs") == "?"
            else f" {field.metadata['metavar']} ..."
            for field in _options_of(cls)
            if field.metadata["positional"]
        )
        # argparse's own usage would list more than a hundred flags.
        parser = Parser(cls.refused, description=cls.description, usage=f"%(prog)s [OPTION ...]{positional}")
        _add_options(parser, cls)
        for flag, (nargs, reason) in cls.not_needed.items():
            parser.add_argument(flag, action=NotNeeded, nargs=nargs, help=f"not needed: {reason}")
        return parser

    @classmethod
    def parse(cls: type[Self], words: Sequence[str] | None = None) -> Self:
        """Parse a command line (default: that of the program), together with its recipe if the program takes one."""
        parser = cls.parser()
        words = list(sys.argv[1:] if words is None else words)
        recipe = _recipe_of(words, cls)
        parsed = vars(parser.parse_args((parser.recipe_words(recipe) if recipe else []) + words))
        return _collect(cls, parsed)

    def flat(self) -> dict[str, Any]:
        """Return all options by name, without their groups."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            found |= vars(value) if dataclasses.is_dataclass(value) else {field.name: value}
        return found


def _options_of(options: type) -> Iterator[dataclasses.Field]:
    """Yield the options of a program, from all groups."""
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        if _is_group(kind):
            yield from _options_of(kind)
        else:
            yield field


def _is_group(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _recipe_of(words: Sequence[str], options: type) -> str | None:
    field = next((field for field in dataclasses.fields(options) if field.name == _CONFIG), None)
    if field is None:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*_flags(field))
    return parser.parse_known_args([hyphenated(word) for word in words])[0].config


def _collect(options: type, parsed: Mapping[str, Any]) -> Any:
    hints = get_type_hints(options)
    values = {}
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        values[field.name] = _collect(kind, parsed) if _is_group(kind) else parsed[field.name]
    return options(**values)


def _add_options(target: Any, options: type) -> None:
    """Add options to a parser or to a group of it."""
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        if _is_group(kind):
            _add_options(target.add_argument_group(field.metadata["title"]), kind)
        else:
            _add_option(target, field, kind)


def _add_option(target: Any, field: dataclasses.Field, kind: Any) -> None:
    details = dict(field.metadata)
    argument = {key: details[key] for key in details.keys() - {"aliases", "off", "positional", "plain"}}
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    kind = _without_none(kind)
    if kind is bool and not details["plain"]:
        argument |= {"action": Switch, "off": details["off"]}
    elif kind is bool:
        argument["action"] = "store_true"
    elif get_origin(kind) is dict:
        argument |= {"action": KeyValues, "nargs": "*"}
    else:
        if get_origin(kind) is list:
            argument.setdefault("nargs", "+")
            kind = get_args(kind)[0]
        if get_origin(kind) is Literal:
            argument.setdefault("choices", list(get_args(kind)))
        elif kind is not str:
            argument.setdefault("type", kind)
    if details["positional"]:
        target.add_argument(field.name, **argument, **({"default": default} if argument.get("nargs") == "?" else {}))
    else:
        target.add_argument(*_flags(field), dest=field.name, default=default, **argument)


def _flags(field: dataclasses.Field) -> list[str]:
    flags = [f"--{field.name.replace('_', '-')}", *field.metadata["aliases"]]
    return sorted(flags, key=lambda flag: flag.startswith("--"))  # short ones first


def _without_none(kind: Any) -> Any:
    """``int | None`` -> ``int``"""
    if get_origin(kind) in (Union, types.UnionType):
        return next(each for each in get_args(kind) if each is not types.NoneType)
    return kind


def whole_number(least: int) -> Callable[[str], int]:
    """Return an argument type: a whole number that is at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return value

    return parse


positive, non_negative = whole_number(1), whole_number(0)
