"""`neighborhood_attention`: argument checks, choice of the implementation, registration."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vision_kernels.arguments import check, check_dims
from vision_kernels.backends import Implementation, Operator, compiled_for_cpu
from vision_kernels.cuda import compiled_for_cuda
from vision_kernels.native import why_not_float32
from vision_kernels.neighborhood_attention.cpu import (
    neighborhood_attention_cpu,
    neighborhood_attention_cpu_backward,
)
from vision_kernels.neighborhood_attention.cuda import (
    neighborhood_attention_cuda,
    neighborhood_attention_cuda_backward,
    why_unable,
)
from vision_kernels.neighborhood_attention.reference import (
    neighborhood_attention_reference,
    neighborhood_attention_reference_backward,
)
from vision_kernels.neighborhood_attention.torch_attention import (
    neighborhood_attention_torch,
    neighborhood_attention_torch_backward,
)
from vision_kernels.registration import register
from vision_kernels.triton_support import compiled_by_triton

_CAPABILITY_OF_HOPPER = (9, 0)


def _why_not_triton(query: Tensor, *others: object) -> str | None:
    """Return why tiles of the Triton kernels do not fit into the shared memory of the GPU, or None if they do."""
    if query.is_cuda:
        least = torch.cuda.get_device_capability(query.device)
        most = 512 if least >= _CAPABILITY_OF_HOPPER else 256  # bytes of a head, rounded up to a power of two
        alike = all(each.dtype == query.dtype for each in others[:2])
        if (1 << (query.shape[4] - 1).bit_length()) * (query.element_size() if alike else 4) > most:
            return f"the GPU has too little shared memory for head_dim {query.shape[4]} in {query.dtype}"
    return why_not_float32(query, *others)


OPERATOR = Operator(
    "neighborhood_attention",
    (
        compiled_for_cuda(neighborhood_attention_cuda, neighborhood_attention_cuda_backward, why_unable),
        *compiled_for_cpu(neighborhood_attention_cpu, neighborhood_attention_cpu_backward, why_not_float32),
        compiled_by_triton(
            "vision_kernels.neighborhood_attention.triton_attention",
            "neighborhood_attention_triton",
            "neighborhood_attention_triton_backward",
            _why_not_triton,
        ),
        Implementation(
            "torch",
            neighborhood_attention_torch,
            neighborhood_attention_torch_backward,
            "plain PyTorch, tiles with dense attention",
        ),
        Implementation(
            "reference",
            neighborhood_attention_reference,
            neighborhood_attention_reference_backward,
            "the definition, gathers all neighbours",
        ),
    ),
)


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: int = 1, bias: Tensor | None = None
) -> Tensor:
    """Neighborhood attention (Hassani et al. 2023, https://arxiv.org/abs/2204.07143; dilated: 2209.15001).

    Each position attends to kernel_size x kernel_size positions around it, `dilation` apart. Where these would reach
    beyond the map, the window is shifted inwards, so that it always has this size::

        logit(p, n) = <query_p, key_n> + bias[(n - p) / dilation + kernel_size - 1]        (for both axes)
        out_p       = sum over the neighbours n of p of softmax_n(logit(p, n)) value_n

    There is no scaling: multiply the query by head_dim ** -0.5 for the usual one. Computed in float32, or in float64
    if `query` is float64, whatever the other dtypes are. Differentiable once in all tensors.

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


def _check(
    grad_out: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> None:
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


def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    arguments = (query, key, value, bias, kernel_size, dilation)
    return OPERATOR.select(query.device.type, *arguments).forward(*arguments).contiguous()


def _fake_forward(query, key, value, bias, kernel_size, dilation):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


# An operator cannot return "no tensor": the gradient of an absent bias is an empty tensor.
def _gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (query, key, value, bias, kernel_size, dilation)
    grads = OPERATOR.select(query.device.type, *arguments).backward(grad_out, *arguments)
    return tuple(query.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _fake_gradients(grad_out, query, key, value, bias, kernel_size, dilation):
    return tuple(
        query.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (query, key, value, bias)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out):
    tensors = ctx.saved_tensors
    grads = torch.ops.vision_kernels.neighborhood_attention_backward(grad_out, *tensors, ctx.kernel_size, ctx.dilation)
    return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True)), None, None


register(
    "neighborhood_attention",
    _forward,
    _fake_forward,
    _gradients,
    _fake_gradients,
    _backward,
    _setup_context,
    check=_check,
    composition=neighborhood_attention_reference,
)


@register_flop_formula(torch.ops.vision_kernels.neighborhood_attention)
def _(query_shape, key_shape, value_shape, bias_shape, kernel_size, *args, **kwargs) -> int:
    """Two products of head_dim for each query and neighbour, and two operations for each product."""
    batch, heads, height, width, dim = query_shape
    return 4 * batch * heads * height * width * kernel_size**2 * dim


@register_flop_formula(torch.ops.vision_kernels.neighborhood_attention_backward)
def _(grad_shape, query_shape, key_shape, value_shape, bias_shape, kernel_size, *args, **kwargs) -> int:
    """As for attention elsewhere: four products, not counting what is computed again."""
    batch, heads, height, width, dim = query_shape
    return 8 * batch * heads * height * width * kernel_size**2 * dim
