"""Dilated attention as attention without dilation on independent sub-grids, one for each pair of residues."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vision_kernels.neighborhood_attention.arguments import AttentionArguments, Gradients
from vision_kernels.precision import compute_dtype
from vision_kernels.views import contiguous_like


def _sub_grids(dilation: int, *maps: Tensor) -> Iterator[list[Tensor]]:
    """Yield views of (batch, heads, height, width, head_dim) maps."""
    for row in range(dilation):
        for column in range(dilation):
            yield [each[:, :, row::dilation, column::dilation] for each in maps]


def forward_on_sub_grids(forward: Callable[[AttentionArguments], Tensor], given: AttentionArguments) -> Tensor:
    """Return the output of dilated attention by `forward`, which computes attention without dilation."""
    if given.dilation == 1:
        return forward(given)
    result = contiguous_like(given.query)
    for out, query, key, value in _sub_grids(given.dilation, result, *given[:3]):
        out.copy_(forward(given._replace(query=query, key=key, value=value, dilation=1)))
    return result


def backward_on_sub_grids(
    backward: Callable[[Tensor, AttentionArguments], Gradients], grad_out: Tensor, given: AttentionArguments
) -> Gradients:
    """Return the gradients of dilated attention by `backward`, which computes those of attention without dilation."""
    if given.dilation == 1:
        return backward(grad_out, given)
    grads = [contiguous_like(each) for each in given[:3]]
    grad_bias = None if given.bias is None else torch.zeros_like(given.bias, dtype=compute_dtype(given.query))
    for *targets, grad, query, key, value in _sub_grids(given.dilation, *grads, grad_out, *given[:3]):
        *found, found_bias = backward(grad, given._replace(query=query, key=key, value=value, dilation=1))
        for target, each in zip(targets, found, strict=True):
            target.copy_(each)
        if grad_bias is not None and found_bias is not None:
            grad_bias += found_bias
    grad_query, grad_key, grad_value = grads
    return grad_query, grad_key, grad_value, grad_bias
