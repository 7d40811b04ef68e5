"""The names that a checkpoint may use, and the plain values that replace them.

A pickle names classes and functions, with arguments. Each admitted name is mapped to a function of this file, which
checks every argument and builds a plain value; the named class or function itself is never called. All names that are
missing in `ADMITTED` are refused.
"""

import math
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Arguments = tuple[Any, ...]
Items = list[tuple[Any, Any]]


class RefusedError(pickle.UnpicklingError):
    """A file uses a name that is not admitted; the message is that name."""


class Storage(Protocol):
    """Tensor data of a file: a sequence of elements of one dtype."""

    def tensor(self, dtype: torch.dtype | None, offset: int, size: list[int], stride: list[int]) -> Tensor:
        """Return a tensor on the data, by default with the storage's own dtype.

        Raises:
            ValueError: The tensor exceeds the data.
        """


@dataclass(frozen=True)
class Admitted:
    """A name that a checkpoint may use.

    Attributes:
        build: Returns the plain value for a call of the name, from its arguments, the state that was set on the result
            (None without any) and the items that were added to it. Raises a ValueError or TypeError for anything that
            the genuine class or function does not write into a pickle.
        reason: Checkpoints that use the name.
        value: Plain value of the name itself, if it is not called; None if it has none.
        storage_dtype: Type of the elements, for storage classes.
    """

    build: Callable[[Arguments, Any, Items], Any]
    reason: str
    value: str | None = None
    storage_dtype: torch.dtype | None = None


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _sizes(values: Any) -> list[int]:
    """Return sizes or strides, at most 64 non-negative integers, as a list."""
    is_sequence = isinstance(values, tuple | list) and len(values) <= 64
    _require(is_sequence and all(type(each) is int and each >= 0 for each in values), "an invalid shape")
    return list(values)


def _refuse_call(arguments: Arguments, state: Any, items: Items) -> Any:
    raise ValueError("a call of a class that is only named in genuine files")


# Python


def _ordered_dict(arguments: Arguments, state: Any, items: Items) -> OrderedDict:
    _require(arguments == (), "an OrderedDict with arguments")
    result = OrderedDict(items)
    if state is not None:  # versions of the submodules of a module
        metadata: Any = state.get("_metadata") if isinstance(state, dict) and len(state) == 1 else None
        _require(isinstance(metadata, dict), "an OrderedDict with attributes")
        _require(all(isinstance(each, dict) for each in metadata.values()), "invalid versions of modules")
        result._metadata = metadata  # type: ignore[attr-defined]  # as torch itself sets it
    return result


def _counter(arguments: Arguments, state: Any, items: Items) -> Counter:
    counts: Any = arguments[0] if len(arguments) == 1 else None
    _require(isinstance(counts, dict) and state is None and not items, "an invalid Counter")
    _require(all(type(count) is int for count in counts.values()), "an invalid Counter")
    return Counter(counts)


def _set(arguments: Arguments, state: Any, items: Items) -> list:
    _require(len(arguments) == 1 and type(arguments[0]) is list and state is None and not items, "an invalid set")
    return arguments[0]


def _empty_bytes(arguments: Arguments, state: Any, items: Items) -> bytes:
    _require(arguments == () and state is None and not items, "bytes with arguments")
    return b""


def _encoded(arguments: Arguments, state: Any, items: Items) -> bytes:
    is_call = len(arguments) == 2 and type(arguments[0]) is str and arguments[1] == "latin1"
    _require(is_call and state is None and not items, "invalid bytes")
    return arguments[0].encode("latin1")


def _namespace(arguments: Arguments, state: Any, items: Items) -> dict[str, Any]:
    _require(arguments == () and not items and isinstance(state, dict), "an invalid Namespace")
    _require(all(type(key) is str for key in state), "a Namespace with unnamed attributes")
    return dict(state)


def _config_node(arguments: Arguments, state: Any, items: Items) -> dict:
    _require(arguments in ((), ({},)) and (state is None or isinstance(state, dict)), "an invalid CfgNode")
    return dict(items)


def _path(flavour: type[PurePosixPath] | type[PureWindowsPath]) -> Callable[[Arguments, Any, Items], str]:
    def build(arguments: Arguments, state: Any, items: Items) -> str:
        _require(all(type(part) is str for part in arguments) and state is None and not items, "an invalid path")
        return str(flavour(*arguments))

    return build


# NumPy

_NUMBERS = ("b1", "u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")  # numpy.dtype(...)


def _dtype(arguments: Arguments, state: Any, items: Items) -> np.dtype:
    code: Any = arguments[0] if arguments else None
    _require(type(code) is str and arguments[1:] in ((), (False, True)) and not items, "an invalid numpy.dtype")
    if code not in _NUMBERS:
        raise RefusedError(f"numpy.dtype({code[:20]!r})")
    order: Any = state[1] if isinstance(state, tuple) and len(state) == 8 else None if state is not None else "="
    _require(order in ("<", ">", "|", "="), "a numpy.dtype with parts")
    if state is not None:
        _require(state == (3, order, None, None, None, -1, -1, 0), "a numpy.dtype with parts")
    return np.dtype(code).newbyteorder(order)


def _numpy_scalar(arguments: Arguments, state: Any, items: Items) -> bool | int | float:
    dtype: Any
    data: Any
    dtype, data = arguments if len(arguments) == 2 else (None, None)
    is_number = isinstance(dtype, np.dtype) and type(data) is bytes and state is None and not items
    _require(is_number and len(data) == dtype.itemsize, "an invalid NumPy scalar")
    return np.frombuffer(data, dtype)[0].item()


def _numpy_array(arguments: Arguments, state: Any, items: Items) -> Tensor:
    is_array = len(arguments) == 3 and arguments[0] is ADMITTED["numpy.ndarray"] and arguments[1:] == ((0,), b"b")
    _require(is_array and isinstance(state, tuple) and len(state) == 5 and not items, "an invalid NumPy array")
    version, shape, dtype, is_fortran, data = state
    _require(version == 1 and isinstance(dtype, np.dtype) and type(is_fortran) is bool, "an invalid NumPy array")
    shape = _sizes(shape)
    has_data = type(data) is bytes and math.prod(shape) * dtype.itemsize == len(data)
    _require(has_data, "a NumPy array whose declared size is wrong")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))  # a copy, because bytes are read-only


# PyTorch


def _check_tensor_options(requires_grad: Any, hooks: Any) -> None:
    _require(type(requires_grad) is bool, "a tensor with an invalid requires_grad")
    _require(hooks is None or (isinstance(hooks, dict) and not hooks), "a tensor with hooks")


def _check_plain_call(state: Any, items: Items) -> None:
    _require(state is None and not items, "a tensor with attributes")


def _on_storage(storage: Storage, dtype: torch.dtype | None, offset: Any, size: Any, stride: Any) -> Tensor:
    _require(hasattr(storage, "tensor") and not isinstance(storage, Tensor), "a tensor without data")
    _require(type(offset) is int and offset >= 0, "a tensor with an invalid offset")
    return storage.tensor(dtype, offset, _sizes(size), _sizes(stride))


def _tensor(arguments: Arguments, state: Any, items: Items) -> Tensor:
    _check_plain_call(state, items)
    storage, offset, size, stride = arguments
    return _on_storage(storage, None, offset, size, stride)


def _tensor_v2(arguments: Arguments, state: Any, items: Items) -> Tensor:
    _check_plain_call(state, items)
    storage, offset, size, stride, requires_grad, hooks, *metadata = arguments
    _check_tensor_options(requires_grad, hooks)
    _require(metadata in ([], [None], [{}]), "a tensor with metadata")
    return _on_storage(storage, None, offset, size, stride)


def _tensor_v3(arguments: Arguments, state: Any, items: Items) -> Tensor:
    _check_plain_call(state, items)
    storage, offset, size, stride, requires_grad, hooks, dtype, *metadata = arguments
    _check_tensor_options(requires_grad, hooks)
    _require(metadata in ([], [None], [{}]), "a tensor with metadata")
    _require(isinstance(dtype, Admitted) and dtype.value in _DTYPES, "a tensor with an invalid dtype")
    return _on_storage(storage, _DTYPES[dtype.value], offset, size, stride)


def _parameter(arguments: Arguments, state: Any, items: Items) -> Tensor:
    _check_plain_call(state, items)
    data, requires_grad, hooks, *attributes = arguments
    _check_tensor_options(requires_grad, hooks)
    _require(isinstance(data, Tensor) and len(attributes) <= 1, "a parameter without data")
    return data


def _tensor_with_attributes(arguments: Arguments, state: Any, items: Items) -> Tensor:
    _check_plain_call(state, items)
    function, kind, its_arguments, _ = arguments
    is_tensor = any(function is ADMITTED[f"torch._utils.{name}"] for name in ("_rebuild_tensor_v2", "_rebuild_tensor"))
    is_plain = kind is ADMITTED["torch.Tensor"] or kind is ADMITTED["torch.nn.parameter.Parameter"]
    _require(is_tensor and is_plain and isinstance(its_arguments, tuple), "a tensor of another class")
    return function.build(its_arguments, None, [])


def _size(arguments: Arguments, state: Any, items: Items) -> tuple[int, ...]:
    _check_plain_call(state, items)
    (values,) = arguments
    return tuple(_sizes(values))


def _device(arguments: Arguments, state: Any, items: Items) -> str:
    _check_plain_call(state, items)
    kind, *index = arguments
    _require(type(kind) is str and len(kind) < 20 and len(index) <= 1, "an invalid device")
    _require(all(type(each) is int for each in index), "an invalid device")
    return ":".join(map(str, arguments))


# MMEngine

_STATISTICS = ("min", "max", "current", "mean")


def _history(arguments: Arguments, state: Any, items: Items) -> dict[str, Any]:
    """Return the logged values of a HistoryBuffer, from which `mambavision.openmmlab.checkpoints` rebuilds it."""
    _require(arguments == () and not items and isinstance(state, dict), "an invalid HistoryBuffer")
    values, counts, length = (state.get(key) for key in ("_log_history", "_count_history", "max_length"))
    _require(isinstance(values, Tensor) and isinstance(counts, Tensor), "an invalid HistoryBuffer")
    _require(values.ndim == 1 and values.shape == counts.shape, "an invalid HistoryBuffer")
    _require(type(length) is int and length > 0, "an invalid HistoryBuffer")
    return {"log_history": values, "count_history": counts, "max_length": length}


def _statistic(arguments: Arguments, state: Any, items: Items) -> str:
    _require(len(arguments) == 2 and state is None and not items, "an invalid call of getattr")
    owner, name = arguments
    if owner is not ADMITTED["mmengine.logging.history_buffer.HistoryBuffer"] or name not in _STATISTICS:
        raise RefusedError("getattr")
    return name


# The table

_EXTRA_DTYPES = {  # without a storage class of their own
    f"torch.{name}": getattr(torch, name) for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
}
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_DTYPES = _EXTRA_DTYPES | {str(dtype): dtype for dtype in _STORAGES.values()}

ADMITTED: Mapping[str, Admitted] = {
    # Weights
    "torch._utils._rebuild_tensor": Admitted(_tensor, "weights of the first versions of PyTorch"),
    "torch._utils._rebuild_tensor_v2": Admitted(_tensor_v2, "weights"),
    "torch._utils._rebuild_tensor_v3": Admitted(_tensor_v3, "weights of dtypes without a storage class"),
    "torch._utils._rebuild_parameter": Admitted(_parameter, "weights saved as parameters"),
    "torch._utils._rebuild_parameter_with_state": Admitted(
        _parameter, "parameters with attributes, such as VMamba's _no_weight_decay, which are dropped"
    ),
    "torch._tensor._rebuild_from_type_v2": Admitted(
        _tensor_with_attributes, "tensors with attributes, which are dropped"
    ),
    "torch.Tensor": Admitted(_refuse_call, "class of tensors with attributes"),
    "torch.nn.parameter.Parameter": Admitted(_refuse_call, "class of parameters with attributes"),
    **{
        f"torch.{name}Storage": Admitted(_refuse_call, "element type of tensor data", storage_dtype=dtype)
        for name, dtype in _STORAGES.items()
    },
    "torch.storage.UntypedStorage": Admitted(
        _refuse_call, "data of dtypes without a storage class", storage_dtype=torch.uint8
    ),
    **{name: Admitted(_refuse_call, "dtype of weights, or a setting", value=name) for name in _DTYPES},
    "torch.Size": Admitted(_size, "shapes in settings and optimizers"),
    "torch.device": Admitted(_device, "a setting of training programs"),
    # Containers
    "collections.OrderedDict": Admitted(_ordered_dict, "state_dict() of modules"),
    "collections.Counter": Admitted(_counter, "milestones of step schedules"),
    "__builtin__.set": Admitted(_set, "attributes of VMamba's settings"),
    "builtins.set": Admitted(_set, "the same, by another version of pickle"),
    # Settings of training programs
    "argparse.Namespace": Admitted(_namespace, "options of timm's and the originals' training programs"),
    "yacs.config.CfgNode": Admitted(_config_node, "settings of VMamba's training program"),
    **{
        f"{module}.{name}": Admitted(_path(flavour), "paths among the options")
        for module in ("pathlib", "pathlib._local")
        for name, flavour in (
            ("PosixPath", PurePosixPath),
            ("PurePosixPath", PurePosixPath),
            ("WindowsPath", PureWindowsPath),
            ("PureWindowsPath", PureWindowsPath),
        )
    },
    # Numbers of NumPy, which name their functions by the module path of the NumPy that wrote them
    **{
        f"numpy.{core}.multiarray.{name}": Admitted(build, reason)
        for core in ("core", "_core")
        for name, build, reason in (
            ("scalar", _numpy_scalar, "metrics and logged values"),
            ("_reconstruct", _numpy_array, "logged values of MMEngine"),
        )
    },
    "numpy.ndarray": Admitted(_refuse_call, "class of arrays"),
    "numpy.dtype": Admitted(_dtype, "type of numbers and arrays"),
    "_codecs.encode": Admitted(_encoded, "bytes of numbers and arrays"),
    "__builtin__.bytes": Admitted(_empty_bytes, "empty arrays"),
    "builtins.bytes": Admitted(_empty_bytes, "the same, by another version of pickle"),
    # Logged values of MMEngine
    "mmengine.logging.history_buffer.HistoryBuffer": Admitted(_history, "logged values"),
    "__builtin__.getattr": Admitted(_statistic, "names of a HistoryBuffer's statistics"),
    "builtins.getattr": Admitted(_statistic, "the same, by another version of pickle"),
}
