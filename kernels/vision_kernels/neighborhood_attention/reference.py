"""The definition of neighborhood attention: gather the neighbours of every query. All backends are compared with it."""

import torch
from torch import Tensor

from vision_kernels.neighborhood_attention.arguments import AttentionArguments, Gradients
from vision_kernels.precision import compute_dtype


def neighbours(size: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions of an axis that each position attends to, and their places in the bias table.

    Only positions with the same residue modulo `dilation` attend to each other. Among these, a window is centered on
    the query, or shifted just enough to lie inside the map.

    Returns:
        positions: (size, kernel_size).
        relative: (size, kernel_size) distance in steps of `dilation`, plus kernel_size - 1.
    """
    query = torch.arange(size, device=device)
    residue, rank = query % dilation, query // dilation
    alike = (size - residue + dilation - 1) // dilation  # positions with this residue
    start = torch.minimum((rank - kernel_size // 2).clamp(min=0), alike - kernel_size)
    ranks = start[:, None] + torch.arange(kernel_size, device=device)
    return ranks * dilation + residue[:, None], ranks - rank[:, None] + kernel_size - 1


class _Gathered:
    """The neighbours of every query, in compute precision; (h, w) are the map, (i, j) the window, d the dimensions."""

    def __init__(self, given: AttentionArguments) -> None:
        query, key, value, bias, kernel_size, dilation = given
        dtype, (height, width) = compute_dtype(query), query.shape[2:4]
        rows, relative_rows = neighbours(height, kernel_size, dilation, query.device)
        columns, relative_columns = neighbours(width, kernel_size, dilation, query.device)
        self.shape, self.table = query.shape, 2 * kernel_size - 1
        self.at = rows[:, None, :, None] * width + columns[None, :, None, :]  # (h, w, i, j)
        self.relative = relative_rows[:, None, :, None] * self.table + relative_columns[None, :, None, :]
        self.query = query.to(dtype)
        self.key, self.value = (each.to(dtype).flatten(2, 3)[:, :, self.at] for each in (key, value))
        logits = torch.einsum("bnhwd,bnhwijd->bnhwij", self.query, self.key)
        if bias is not None:
            logits = logits + bias.to(dtype).flatten(1)[:, self.relative]
        self.weights = logits.flatten(-2).softmax(-1).view_as(logits)

    def scatter(self, grad: Tensor) -> Tensor:
        """Sum (b, n, h, w, i, j, d) at the positions from which the neighbours were gathered."""
        batch, heads, height, width, dim = self.shape
        total = grad.new_zeros(batch, heads, height * width, dim)
        return total.index_add_(2, self.at.flatten(), grad.flatten(2, 5)).view(self.shape)

    def scatter_bias(self, grad: Tensor) -> Tensor:
        """Sum (b, n, h, w, i, j) at the places from which the bias was gathered."""
        total = grad.new_zeros(grad.shape[1], self.table**2)
        return total.index_add_(1, self.relative.flatten(), grad.sum(0).flatten(1)).unflatten(1, (self.table, -1))


def forward(given: AttentionArguments) -> Tensor:
    """Return the output with the shape of query."""
    at = _Gathered(given)
    return torch.einsum("bnhwij,bnhwijd->bnhwd", at.weights, at.value)


def backward(grad_out: Tensor, given: AttentionArguments) -> Gradients:
    """Return the gradients of query, key, value and bias."""
    at = _Gathered(given)
    grad_out = grad_out.to(at.query.dtype)
    grad_weights = torch.einsum("bnhwd,bnhwijd->bnhwij", grad_out, at.value)
    mean = (at.weights * grad_weights).sum((-2, -1), keepdim=True)
    grad_logits = at.weights * (grad_weights - mean)
    return (
        torch.einsum("bnhwij,bnhwijd->bnhwd", grad_logits, at.key),
        at.scatter(grad_logits.unsqueeze(-1) * at.query[:, :, :, :, None, None]),
        at.scatter(at.weights.unsqueeze(-1) * grad_out[:, :, :, :, None, None]),
        None if given.bias is None else at.scatter_bias(grad_logits),
    )
