"""`neighborhood_attention`: argument checks, backends, registration."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.arguments import check, check_dims
from vision_kernels.backends import Implementation, Operator
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.native import compiled_for_cpu, why_not_float32
from vision_kernels.neighborhood_attention import cpu, cuda, reference, torch_attention
from vision_kernels.neighborhood_attention.arguments import AttentionArguments
from vision_kernels.registration import register
from vision_kernels.triton_support import compiled_by_triton

_CAPABILITY_OF_HOPPER = (9, 0)


def _why_not_triton(given: AttentionArguments) -> str | None:
    """Return why tiles of the Triton kernels do not fit into the shared memory of the GPU, or None if they do."""
    query, key, value = given[:3]
    if query.is_cuda:
        capability = torch.cuda.get_device_capability(query.device)
        most = 512 if capability >= _CAPABILITY_OF_HOPPER else 256  # bytes of a head, rounded up to a power of two
        alike = query.dtype == key.dtype == value.dtype
        if (1 << (query.shape[4] - 1).bit_length()) * (query.element_size() if alike else 4) > most:
            return f"the GPU has too little shared memory for head_dim {query.shape[4]} in {query.dtype}"
    return why_not_float32(given)


OPERATOR = Operator(
    "neighborhood_attention",
    (
        compiled_for_cuda(cuda.forward, cuda.backward, cuda.why_unable),
        *compiled_for_cpu(cpu.forward, cpu.backward, why_not_float32),
        compiled_by_triton("vision_kernels.neighborhood_attention.triton_attention", why_unable=_why_not_triton),
        Implementation(
            "torch", torch_attention.forward, torch_attention.backward, "plain PyTorch, tiles with dense attention"
        ),
        Implementation("reference", reference.forward, reference.backward, "the definition, gathers all neighbours"),
    ),
)


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: int = 1, bias: Tensor | None = None
) -> Tensor:
    """Neighborhood attention (Hassani et al. 2023, https://arxiv.org/abs/2204.07143; dilated: 2209.15001).

    Each position attends to kernel_size x kernel_size positions around it, `dilation` apart. Near the border the window
    is shifted inwards, so that it always has this size::

        logit(p, n) = <query_p, key_n> + bias[(n - p) / dilation + kernel_size - 1]        (for both axes)
        out_p       = sum over the neighbours n of p of softmax_n(logit(p, n)) value_n

    There is no scaling: multiply the query by head_dim ** -0.5 for the usual one. Computed in float32, or in float64
    if `query` is float64, regardless of the other dtypes. Differentiable once in all tensors.

    Args:
        query: (batch, heads, height, width, head_dim).
        key: As query.
        value: As query.
        kernel_size: Side of the window, odd.
        dilation: Distance between neighbours; kernel_size * dilation may not exceed height or width.
        bias: (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), for each relative position.

    Returns:
        (batch, heads, height, width, head_dim), contiguous, with the dtype of `query`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; names the argument and both shapes.
    """
    return torch.ops.vision_kernels.neighborhood_attention(query, key, value, bias, kernel_size, dilation)


def _check(grad_out: Tensor | None, given: AttentionArguments) -> None:
    query, key, value, bias, kernel_size, dilation = given
    operator = "neighborhood_attention"
    check_dims(operator, "query", query, "batch, heads, height, width, head_dim")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{operator}: kernel_size must be odd and at least 1, got {kernel_size}")
    if dilation < 1:
        raise ValueError(f"{operator}: dilation must be at least 1, got {dilation}")
    shape, side, reach = tuple(query.shape), 2 * kernel_size - 1, kernel_size * dilation
    check(
        operator,
        {
            "query": (query, shape),
            "key": (key, shape),
            "value": (value, shape),
            "bias": (bias, (shape[1], side, side)),
            "grad_out": (grad_out, shape),
        },
    )
    if reach > min(shape[2:4]):
        raise ValueError(
            f"{operator}: kernel_size {kernel_size} with dilation {dilation} needs a map of at least {(reach, reach)}, "
            f"query {shape} has {shape[2:4]}"
        )


register(OPERATOR, AttentionArguments, _check, reference.forward, gradient="grad_out")


@register_flop_formula(torch.ops.vision_kernels.neighborhood_attention)
def _(query_shape, key_shape, value_shape, bias_shape, kernel_size, *args, **kwargs) -> int:
    """Count two dot products of head_dim for each query and neighbour, with two operations per element."""
    batch, heads, height, width, dim = query_shape
    return 4 * batch * heads * height * width * kernel_size**2 * dim


@register_flop_formula(torch.ops.vision_kernels.neighborhood_attention_backward)
def _(grad_shape, query_shape, key_shape, value_shape, bias_shape, kernel_size, *args, **kwargs) -> int:
    """Count four products, as usual for attention; recomputation is not counted."""
    batch, heads, height, width, dim = query_shape
    return 8 * batch * heads * height * width * kernel_size**2 * dim
