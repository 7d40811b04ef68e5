"""The instructions of a pickle, followed without calling anything, and the plain values that they describe.

The instructions are those that torch.save writes (pickle protocol 2); any other is refused. What they describe is made
in two steps: `follow` collects containers, scalars and calls as they come, calling nothing; `as_plain` turns calls into
the values that `mambavision.unpickling.admitted` builds, and accepts nothing but plain types in the result.
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

# Checkpoints of the largest models, with optimizer and random states of 16 processes, stay below a third of these.
_MOST_INSTRUCTIONS = 1_000_000
_LARGEST_TREE = 1_000_000  # values, those with several places counted at each, as whoever walks through it meets them
_DEEPEST_TREE = 60

_SCALARS = (str, bytes, bool, int, float, type(None))
_PLAIN = (*_SCALARS, dict, OrderedDict, Counter, list, tuple, Tensor)

_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class _Call:
    """A call that a pickle describes, and what it does to the result afterwards."""

    function: Admitted
    arguments: tuple
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)


def follow(file: BinaryIO, storage_of: StorageOf) -> Any:
    """Follow the instructions of one pickle, to which it stands and after which it is left.

    Args:
        file: Positioned at the first instruction.
        storage_of: Returns the storage for the identity that a tensor's data has in the pickle.

    Raises:
        RefusedError: The pickle names something that is not admitted, or uses other instructions than torch.save.
        ValueError, TypeError, LookupError: It is damaged.
    """
    machine = _Machine(storage_of)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count >= _MOST_INSTRUCTIONS:
            raise ValueError(f"more than {_MOST_INSTRUCTIONS:,} instructions")
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
        # Other keys could take for ever to hash, or are found in no checkpoint.
        if not all(type(key) in _SCALARS and not (type(key) is int and abs(key) >= 2**60) for key, _ in pairs):
            raise TypeError("a dictionary key that is neither text nor a number")
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
    """Return what `follow` returned in plain types: dict, list, tuple, str, bytes, numbers, None and tensors.

    Raises:
        RefusedError: Something else is in it.
        ValueError, TypeError, LookupError: It is damaged, or meant to exhaust whoever reads it.
    """
    maker = _Maker()
    value = maker.value(described, depth=0)
    if maker.size_of(described) > _LARGEST_TREE:
        raise ValueError(f"more than {_LARGEST_TREE:,} values")
    return value


class _Maker:
    """Makes plain values; each once, however many places it has, as tensors may share their data."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, bool], Any] = {}  # by identity, and whether it is an argument
        self._begun: set[tuple[int, bool]] = set()
        self._sizes: dict[int, int] = {}

    def size_of(self, node: Any) -> int:
        return self._sizes.get(id(node), 1 + len(node) // 100 if type(node) in (str, bytes) else 1)

    def value(self, node: Any, depth: int, is_argument: bool = False) -> Any:
        """Return the value that a node describes: a plain one unless it is an argument of something admitted."""
        made = self._once(node, depth, is_argument) if type(node) in (dict, list, tuple, _Call) else node
        if is_argument or type(made) in _PLAIN:
            return made
        if type(made) is Admitted and made.value is not None:
            return made.value
        raise RefusedError(next((name for name, each in ADMITTED.items() if each is made), type(made).__name__))

    def _once(self, node: Any, depth: int, is_argument: bool) -> Any:
        key = id(node), is_argument
        if key not in self._made:
            if key in self._begun or depth > _DEEPEST_TREE:
                raise ValueError("values that contain themselves or are nested too deeply")
            self._begun.add(key)
            self._made[key] = self._make(node, depth + 1, is_argument)
            self._sizes[id(node)] = min(1 + sum(map(self.size_of, _parts(node))), 2 * _LARGEST_TREE)
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
