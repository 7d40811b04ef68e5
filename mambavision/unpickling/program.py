"""Interpreter for the instructions of a pickle that calls nothing and returns plain values.

Only the instructions that torch.save writes (pickle protocol 2) are accepted. There are two steps: `follow` collects
containers, scalars and descriptions of calls; `as_plain` replaces the calls by the values that
`mambavision.unpickling.admitted` builds, and accepts only plain types in the result.
"""

import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO, ClassVar

from torch import Tensor

from mambavision.unpickling.admitted import ADMITTED, Admitted, RefusedError, Storage

StorageOf = Callable[[tuple], Storage]

# Checkpoints of the largest models, with optimizer and random states of 16 processes, need less than a third of these.
_MAX_INSTRUCTIONS = 1_000_000
_MAX_VALUES = 1_000_000  # in the tree of values, where a value in several places counts several times
_MAX_DEPTH = 60

_SCALARS = (str, bytes, bool, int, float, type(None))
_PLAIN = (*_SCALARS, dict, OrderedDict, Counter, list, tuple, Tensor)

_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class _Call:
    """A call that a pickle describes, with the state and the items that it adds to the result."""

    function: Admitted
    arguments: tuple
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)


def follow(file: BinaryIO, storage_of: StorageOf) -> Any:
    """Interpret one pickle and return what it describes, with calls as descriptions.

    Args:
        file: Positioned at the first instruction; afterwards behind the last one.
        storage_of: Returns the storage for a reference to tensor data.

    Raises:
        RefusedError: The pickle uses a name that is not admitted, or an instruction that torch.save does not write.
        ValueError, TypeError, LookupError: The pickle is damaged.
    """
    machine = _Machine(storage_of)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count >= _MAX_INSTRUCTIONS:
            raise ValueError(f"more than {_MAX_INSTRUCTIONS:,} instructions")
        machine.step(opcode.name, argument)
    (result,) = machine.stack
    return result


class _Machine:
    """Stack, marks and memo of a pickle."""

    def __init__(self, storage_of: StorageOf) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks below each mark
        self._memo: dict[int, Any] = {}
        self._storage_of = storage_of

    def step(self, name: str, argument: Any) -> None:
        if name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack[-_TUPLES[name] :] = [tuple(self._top(_TUPLES[name]))]
        elif name not in ("PROTO", "STOP"):
            if name not in self._ACTIONS:
                raise RefusedError(f"pickle's instruction {name}")
            self._ACTIONS[name](self, *(() if argument is None else (argument,)))

    def _top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("an instruction without operands")
        return self.stack[-count:]

    def _mark(self) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def _empty_dict(self) -> None:
        self.stack.append({})

    def _empty_list(self) -> None:
        self.stack.append([])

    def _tuple(self) -> None:
        items = self._since_mark()
        self.stack.append(tuple(items))

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError("an item appended to something other than a list")
        target.extend(items)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self) -> None:
        self._set(self._since_mark())

    def _set(self, flat: list[Any]) -> None:
        target, pairs = self.stack[-1], list(zip(flat[::2], flat[1::2], strict=True))
        # Other keys do not occur in checkpoints, or may take forever to hash.
        if not all(type(key) in _SCALARS and not (type(key) is int and abs(key) >= 2**60) for key, _ in pairs):
            raise TypeError("a dictionary key that is neither a string nor a number")
        if type(target) is dict:
            target.update(pairs)
        elif type(target) is _Call:
            target.items.extend(pairs)
        else:
            raise TypeError("an item set in something other than a dictionary")

    def _global(self, name: str) -> None:
        name = ".".join(name.split(" "))
        if name not in ADMITTED:
            raise RefusedError(name.replace("__builtin__.", ""))
        self.stack.append(ADMITTED[name])

    def _reduce(self) -> None:
        function, arguments = self._top(2)
        if type(function) is not Admitted or type(arguments) is not tuple:
            raise TypeError("a call of something other than a function")
        self.stack[-2:] = [_Call(function, arguments)]

    def _build(self) -> None:
        call, state = self._top(2)
        if type(call) is not _Call or call.state is not None:
            raise TypeError("a state set on something without one")
        call.state = state
        self.stack.pop()

    def _binpersid(self) -> None:
        identity = self.stack.pop()
        if type(identity) is not tuple:
            raise TypeError("an invalid reference to tensor data")
        self.stack.append(self._storage_of(identity))

    _ACTIONS: ClassVar[dict[str, Callable]] = {
        "MARK": _mark,
        "EMPTY_DICT": _empty_dict,
        "EMPTY_LIST": _empty_list,
        "TUPLE": _tuple,
        "APPEND": _append,
        "APPENDS": _appends,
        "SETITEM": _setitem,
        "SETITEMS": _setitems,
        "GLOBAL": _global,
        "REDUCE": _reduce,
        "NEWOBJ": _reduce,  # a class instead of a function
        "BUILD": _build,
        "BINPERSID": _binpersid,
    }


def as_plain(described: Any) -> Any:
    """Convert the result of `follow` to plain types: dict, list, tuple, str, bytes, numbers, None and tensors.

    Raises:
        RefusedError: It contains another type.
        ValueError, TypeError, LookupError: It is damaged, or designed to exhaust memory or time.
    """
    maker = _Maker()
    value = maker.value(described, depth=0)
    if maker.size_of(described) > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES:,} values")
    return value


class _Maker:
    """Makes plain values, each once even if it occurs several times, so that tensors keep sharing their data."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, bool], Any] = {}  # by identity and `is_argument`
        self._begun: set[tuple[int, bool]] = set()
        self._sizes: dict[int, int] = {}

    def size_of(self, node: Any) -> int:
        return self._sizes.get(id(node), 1 + len(node) // 100 if type(node) in (str, bytes) else 1)

    def value(self, node: Any, depth: int, is_argument: bool = False) -> Any:
        """Return the value that a node describes: a plain one unless it is an argument of an admitted call."""
        made = self._once(node, depth, is_argument) if type(node) in (dict, list, tuple, _Call) else node
        if is_argument or type(made) in _PLAIN:
            return made
        if type(made) is Admitted and made.value is not None:
            return made.value
        raise RefusedError(next((name for name, each in ADMITTED.items() if each is made), type(made).__name__))

    def _once(self, node: Any, depth: int, is_argument: bool) -> Any:
        key = id(node), is_argument
        if key not in self._made:
            if key in self._begun or depth > _MAX_DEPTH:
                raise ValueError("values that contain themselves or are nested too deeply")
            self._begun.add(key)
            self._made[key] = self._make(node, depth + 1, is_argument)
            self._sizes[id(node)] = min(1 + sum(map(self.size_of, _parts(node))), 2 * _MAX_VALUES)
        return self._made[key]

    def _make(self, node: Any, depth: int, is_argument: bool) -> Any:
        if type(node) is dict:
            return {key: self.value(each, depth) for key, each in node.items()}
        if type(node) is list:
            return [self.value(each, depth) for each in node]
        if type(node) is tuple:
            return tuple(self.value(each, depth, is_argument) for each in node)
        arguments = tuple(self.value(each, depth, is_argument=True) for each in node.arguments)
        state = self.value(node.state, depth, is_argument=True)
        return node.function.build(arguments, state, [(key, self.value(each, depth)) for key, each in node.items])


def _parts(node: Any) -> list[Any]:
    if type(node) is _Call:
        return [*node.arguments, node.state, *chain.from_iterable(node.items)]
    return list(chain.from_iterable(node.items())) if type(node) is dict else list(node)
