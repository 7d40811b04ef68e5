"""Registration of operators with torch.library.

Registered, an operator is a single node for autograd, `torch.compile(fullgraph=True)`, `torch.export` and fake tensors.
Defined through `Library`, which has less to do in each call than `torch.library.custom_op`: small scans are quick.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("vision_kernels", "FRAGMENT")


def register(
    name: str,
    forward: Callable,
    fake_forward: Callable,
    backward: Callable,
    fake_backward: Callable,
    apply_backward: Callable,
    setup_context: Callable,
) -> None:
    """Make `torch.ops.vision_kernels.<name>`, and `<name>_backward`, of functions that change none of their arguments.

    Args:
        name: Name of the operator.
        forward: Annotated function, from which the schema is read. Its results must not share memory with its
            arguments.
        fake_forward: The same on tensors without data: shapes, dtypes and strides of the results.
        backward: Annotated function that computes the gradients, an operator of its own.
        fake_backward: The same on tensors without data.
        apply_backward: Calls `<name>_backward` from what autograd hands over, as for `torch.library.register_autograd`.
        setup_context: Keeps what `apply_backward` needs, as for `torch.library.register_autograd`.
    """
    define(name, forward, fake_forward, apply_backward, setup_context)
    define(f"{name}_backward", backward, fake_backward, _refuse_second_derivative, None)


def define(name: str, function: Callable, fake: Callable, backward: Callable, setup_context: Callable | None) -> None:
    """Make `torch.ops.vision_kernels.<name>` alone, whose gradient is that of other operators.

    Args:
        name: Name of the operator.
        function: As `forward` of `register`.
        fake: As `fake_forward` of `register`.
        backward: As `apply_backward` of `register`, calling any operators.
        setup_context: As for `register`; None if `backward` needs nothing.
    """
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    qualified = f"vision_kernels::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)


def _refuse_second_derivative(*arguments: Any) -> None:
    # Without this the gradient would count as a constant, and second derivatives would silently lack its part.
    raise RuntimeError("vision_kernels operators can be differentiated once, not twice")
