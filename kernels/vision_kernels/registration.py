"""Registration of operators with torch.library.

A registered operator is a single node for autograd, `torch.compile(fullgraph=True)`, `torch.export` and fake tensors.
Operators are defined through `Library`, which adds less overhead per call than `torch.library.custom_op`; this matters
for small scans.

Exported programs call `torch.ops.vision_kernels.<name>` directly, so arguments are checked in the operators themselves,
with or without data.
"""

from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vision_kernels.backends import Operator
from vision_kernels.views import in_dtype

_in_forward_mode: dict[str, Callable] = {}
_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "SymInt", str: "str", torch.dtype: "ScalarType"
}  # fmt: skip


class _Library(torch.library.Library):
    """Operators that use `_in_forward_mode` for inputs with a tangent, which autograd would silently treat as zero."""

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **options: Any) -> Any:
        if dispatch_key == "Autograd":
            fn = _with_forward_mode(fn, _in_forward_mode[op_name])
        return super().impl(op_name, fn, dispatch_key, **options)


def _with_forward_mode(reverse_mode: Callable, composition: Callable) -> Callable:
    def differentiable(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        # Runs in every call, so the cheapest test comes first: whether there can be tangents at all. Graphs of
        # torch.compile enter a transform without the level that forward_ad counts.
        dual = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
        if dual and any(map(_has_tangent, arguments)):
            return composition(*arguments)
        return reverse_mode(keyset, *arguments)

    return differentiable


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument, level=0).tangent is not None


_LIBRARY = _Library("vision_kernels", "FRAGMENT")


def register(
    operator: Operator,
    arguments: type,
    check: Callable[[Tensor | None, Any], None],
    composition: Callable[[Any], Tensor],
    *,
    gradient: str = "grad_y",
    memory_format: Callable[[Tensor], torch.memory_format] = lambda first: torch.contiguous_format,
) -> None:
    """Define `torch.ops.vision_kernels.<name>`, and `<name>_backward` which computes its gradients.

    The result has the shape of the first argument, and the dtype `out_dtype` or else that of the first argument.
    Backends, `check` and `composition` take the arguments as one named tuple.

    Args:
        operator: The name and the backends.
        arguments: A NamedTuple from which the schema is read: tensors, other values, and `out_dtype` last if there is
            one. The backward operator takes the gradient of the result instead, and has its dtype as `out_dtype`.
        check: Raises a ValueError unless the gradient of the result, or None, and the arguments fit together.
        composition: The same in PyTorch's operations, which have forward-mode derivatives.
        gradient: Name of the gradient of the result in the schema.
        memory_format: Returns the memory format of the result, and of the gradient of the first argument.
    """
    kinds = get_type_hints(arguments)
    without_dtype = {name: kind for name, kind in kinds.items() if kind is not torch.dtype}
    forward = _Differentiable(operator, arguments, check, memory_format)
    define(
        operator.name,
        kinds,
        forward.prepare,
        forward.compute,
        forward.allocate,
        lambda given: in_dtype(composition(given), forward.dtype(given)),
        forward.apply_backward,
        forward.setup_context,
    )
    define(
        f"{operator.name}_backward",
        {gradient: Tensor} | without_dtype,
        forward.prepare_backward,
        forward.compute_gradients,
        forward.allocate_gradients,
        _refuse_second_derivative,
        _refuse_second_derivative,
        results=forward.tensors,
    )


class _Differentiable:
    """The functions that define an operator and its backward operator; parameters as in `register`."""

    def __init__(self, operator: Operator, arguments: type, check: Callable, memory_format: Callable) -> None:
        self.operator, self.arguments, self.check, self.memory_format = operator, arguments, check, memory_format
        kinds = list(get_type_hints(arguments).values())
        self.tensors = sum(kind in (Tensor, Tensor | None) for kind in kinds)  # they come first
        self.others = len(kinds) - self.tensors
        self.has_dtype = kinds[-1] is torch.dtype

    def prepare(self, *values: Any) -> tuple:
        given = self.arguments(*values)
        self.check(None, given)
        return (given,)

    def prepare_backward(self, grad: Tensor, *values: Any) -> tuple:
        given = self.arguments(*values, grad.dtype) if self.has_dtype else self.arguments(*values)
        self.check(grad, given)
        return grad, given

    def compute(self, given: Any) -> Tensor:
        y = self.operator.select(given[0].device.type, given).forward(given)
        return in_dtype(y, self.dtype(given)).contiguous(memory_format=self.memory_format(given[0]))

    def allocate(self, given: Any) -> Tensor:
        return torch.empty_like(given[0], dtype=self.dtype(given), memory_format=self.memory_format(given[0]))

    def dtype(self, given: Any) -> torch.dtype:
        return given[-1] if self.has_dtype else given[0].dtype

    # An operator cannot return "no tensor": the gradient of an absent tensor is an empty tensor.

    def compute_gradients(self, grad: Tensor, given: Any) -> tuple[Tensor, ...]:
        backward = self.operator.select(given[0].device.type, given).backward
        assert backward is not None
        found = zip(given[: self.tensors], self._layouts(given), backward(grad, given), strict=True)
        return tuple(
            given[0].new_empty(0) if each is None else in_dtype(each, tensor.dtype).contiguous(memory_format=layout)
            for tensor, layout, each in found
        )

    def allocate_gradients(self, grad: Tensor, given: Any) -> tuple[Tensor, ...]:
        return tuple(
            given[0].new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=layout)
            for tensor, layout in zip(given[: self.tensors], self._layouts(given), strict=True)
        )

    def _layouts(self, given: Any) -> list[torch.memory_format]:
        return [self.memory_format(given[0])] + [torch.contiguous_format] * (self.tensors - 1)

    def setup_context(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[: self.tensors])
        ctx.others = inputs[self.tensors : len(inputs) - self.has_dtype]

    def apply_backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads = getattr(torch.ops.vision_kernels, f"{self.operator.name}_backward")(grad, *tensors, *ctx.others)
        found = (None if tensor is None else each for tensor, each in zip(tensors, grads, strict=True))
        return *found, *(None,) * self.others


def define(
    name: str,
    parameters: Mapping[str, Any],
    prepare: Callable[..., tuple],
    compute: Callable[..., Tensor | tuple[Tensor, ...]],
    allocate: Callable[..., Tensor | tuple[Tensor, ...]],
    composition: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable | None = None,
    *,
    results: int = 1,
) -> None:
    """Define `torch.ops.vision_kernels.<name>` alone, which changes none of its arguments.

    If the first argument is empty, nothing is computed: the results are zero.

    Args:
        name: Name of the operator.
        parameters: Name and type of each parameter.
        prepare: Checks the arguments, raising a ValueError, and returns those of the next three functions.
        compute: Returns the results, which must not share memory with the arguments.
        allocate: Returns tensors with the shapes, dtypes and strides of the results; tensors may have no data.
        composition: The same as `compute` in PyTorch's operations, which have forward-mode derivatives.
        backward: Computes the gradients, as for `torch.library.register_autograd`.
        setup_context: As for `torch.library.register_autograd`; None if `backward` needs nothing.
        results: Number of results.
    """
    needed = [(at, parameter) for at, (parameter, kind) in enumerate(parameters.items()) if kind is Tensor]

    def prepared(*values: Any) -> tuple:
        for at, parameter in needed:
            if values[at] is None:  # the dispatcher accepts it
                raise ValueError(f"{name}: {parameter} must be a tensor, got None")
        return prepare(*values)

    def run(*values: Any) -> Tensor | tuple[Tensor, ...]:
        given = prepared(*values)
        if values[0].numel() == 0:
            empty = allocate(*given)
            return empty.zero_() if isinstance(empty, Tensor) else tuple(each.zero_() for each in empty)
        return compute(*given)

    _in_forward_mode[name] = lambda *values: composition(*prepared(*values))
    taken = ", ".join(f"{_SCHEMA_TYPES[kind]} {parameter}" for parameter, kind in parameters.items())
    returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    _LIBRARY.define(f"{name}({taken}) -> {returned}", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    qualified = f"vision_kernels::{name}"
    torch.library.register_fake(qualified, lambda *values: allocate(*prepared(*values)), lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)


def _refuse_second_derivative(*arguments: Any) -> None:
    # Otherwise the gradient would count as a constant, and second derivatives would silently lack its part.
    raise RuntimeError("vision_kernels operators can be differentiated once, not twice")
