"""Registration of operators with torch.library.

Registered, an operator is a single node for autograd, `torch.compile(fullgraph=True)`, `torch.export` and fake tensors.
Defined through `Library`, which has less to do in each call than `torch.library.custom_op`: small scans are quick.

Exported programs call `torch.ops.vision_kernels.<name>` directly, so arguments are checked in the operators themselves,
whether their tensors have data or not.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_in_forward_mode: dict[str, Callable] = {}


class _Library(torch.library.Library):
    """Operators that use `_in_forward_mode` where a tangent comes in; autograd would take it for zero, silently."""

    def impl(self, name: str, function: Callable, dispatch_key: str = "", **options: Any) -> Any:
        if dispatch_key == "Autograd":
            function = _with_forward_mode(function, _in_forward_mode[name])
        return super().impl(name, function, dispatch_key, **options)


def _with_forward_mode(reverse_mode: Callable, composition: Callable) -> Callable:
    def differentiable(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        # Asked in every call, so first what is quickest: whether there are tangents anywhere.
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            return composition(*arguments)
        return reverse_mode(keyset, *arguments)

    return differentiable


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


_LIBRARY = _Library("vision_kernels", "FRAGMENT")


def register(
    name: str,
    forward: Callable,
    fake_forward: Callable,
    backward: Callable,
    fake_backward: Callable,
    apply_backward: Callable,
    setup_context: Callable,
    *,
    check: Callable,
    composition: Callable,
) -> None:
    """Make `torch.ops.vision_kernels.<name>`, and `<name>_backward`, of functions that change none of their arguments.

    If the first argument is empty, no function is called: then outputs are empty, and gradients zero.

    Args:
        name: Name of the operator.
        forward: Annotated function, from which the schema is read. Its results must not share memory with its
            arguments.
        fake_forward: The same on tensors without data: shapes, dtypes and strides of the results.
        backward: Annotated function that computes the gradients, an operator of its own. Its arguments are the
            gradient of the result, then those of `forward`, of which the last ones may be missing.
        fake_backward: The same on tensors without data.
        apply_backward: Calls `<name>_backward` from what autograd hands over, as for `torch.library.register_autograd`.
        setup_context: Keeps what `apply_backward` needs, as for `torch.library.register_autograd`.
        check: Raises a ValueError unless it can be computed; takes the arguments of `backward`, and of `forward` behind
            None for the gradient.
        composition: The same as `forward` in PyTorch's operations, which have forward-mode derivatives.
    """
    check_forward = functools.partial(check, None)
    define(name, forward, fake_forward, apply_backward, setup_context, check=check_forward, composition=composition)
    refuse = {"composition": _refuse_second_derivative}
    define(f"{name}_backward", backward, fake_backward, _refuse_second_derivative, None, check=check, **refuse)


def define(
    name: str,
    function: Callable,
    fake: Callable,
    backward: Callable,
    setup_context: Callable | None,
    *,
    check: Callable,
    composition: Callable,
) -> None:
    """Make `torch.ops.vision_kernels.<name>` alone, whose gradient is that of other operators.

    Args:
        name: Name of the operator.
        function: As `forward` of `register`.
        fake: As `fake_forward` of `register`.
        backward: As `apply_backward` of `register`, calling any operators.
        setup_context: As for `register`; None if `backward` needs nothing.
        check: Raises a ValueError unless the arguments can be computed.
        composition: As for `register`.
    """

    schema = torch.library.infer_schema(function, mutates_args=())
    required = [
        (position, each.name)
        for position, each in enumerate(torch._C.parse_schema(name + schema).arguments)
        if str(each.type) == "Tensor"
    ]

    def check_all(*arguments: Any) -> None:
        # The dispatcher takes None for any tensor.
        for position, argument in required:
            if arguments[position] is None:
                raise ValueError(f"{name}: {argument} must be a tensor, got None")
        check(*arguments)

    def run(first: Tensor, *others: Any) -> Tensor | tuple[Tensor, ...]:
        check_all(first, *others)
        if first.numel() == 0:
            results = fake(first, *others)
            return results.zero_() if isinstance(results, Tensor) else tuple(each.zero_() for each in results)
        return function(first, *others)

    def run_fake(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        check_all(*arguments)
        return fake(*arguments)

    def compose(*arguments: Any) -> Tensor:
        check_all(*arguments)
        return composition(*arguments)

    _in_forward_mode[name] = compose
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    qualified = f"vision_kernels::{name}"
    torch.library.register_fake(qualified, run_fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)


def _refuse_second_derivative(*arguments: Any) -> None:
    # Without this the gradient would count as a constant, and second derivatives would silently lack its part.
    raise RuntimeError("vision_kernels operators can be differentiated once, not twice")
