"""Dilated attention is attention without dilation on the sub-grids of equal residues, which do not see each other."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vision_kernels.precision import compute_dtype


def _sub_grids(dilation: int, *maps: Tensor) -> Iterator[list[Tensor]]:
    """Yield views of (batch, heads, height, width, head_dim) maps."""
    for row in range(dilation):
        for column in range(dilation):
            yield [each[:, :, row::dilation, column::dilation] for each in maps]


def forward_on_sub_grids(forward: Callable, query, key, value, bias, kernel_size: int, dilation: int) -> Tensor:
    """Return the output of dilated attention by `forward(query, key, value, bias, kernel_size)`, which has none."""
    if dilation == 1:
        return forward(query, key, value, bias, kernel_size)
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    for out, *inputs in _sub_grids(dilation, result, query, key, value):
        out.copy_(forward(*inputs, bias, kernel_size))
    return result


def backward_on_sub_grids(
    backward: Callable, grad_out, query, key, value, bias, kernel_size: int, dilation: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of dilated attention by `backward(grad_out, query, key, value, bias, kernel_size)`.

    Its gradients may have a higher precision than the inputs.
    """
    maps = (grad_out, query, key, value)
    if dilation == 1:
        *grads, grad_bias = backward(*maps, bias, kernel_size)
        grads = [grad.to(each.dtype) for grad, each in zip(grads, (query, key, value), strict=True)]
    else:
        grads = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value)]
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=compute_dtype(query))
        for grid in _sub_grids(dilation, *grads, *maps):
            *found, found_bias = backward(*grid[3:], bias, kernel_size)
            for target, grad in zip(grid[:3], found, strict=True):
                target.copy_(grad)
            if grad_bias is not None:
                grad_bias += found_bias
    return *grads, None if bias is None else grad_bias.to(bias.dtype)
