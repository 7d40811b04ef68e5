"""Registration of operators with torch.library.

Registered, an operator is a single node for autograd, `torch.compile(fullgraph=True)`, `torch.export` and fake tensors.
Defined through `Library`, whose dispatch costs a tenth of that of `torch.library.custom_op`: some scans take less time
than that.
"""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("vision_kernels", "FRAGMENT")


def register(implementation: Callable, fake: Callable, name: str) -> None:
    """Make `torch.ops.vision_kernels.<name>` of a function on tensors that changes none of its arguments.

    Args:
        implementation: Annotated function, from which the schema is read. Its results must not share memory with its
            arguments.
        fake: The same on tensors without data: shapes, dtypes and strides of the results.
        name: Name of the operator.
    """
    schema = torch.library.infer_schema(implementation, mutates_args=())
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vision_kernels::{name}", fake, lib=_LIBRARY)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give an operator its gradient, as `torch.library.register_autograd` does."""
    torch.library.register_autograd(f"vision_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
