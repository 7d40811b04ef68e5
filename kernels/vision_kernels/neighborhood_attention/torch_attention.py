"""Neighborhood attention in plain PyTorch, for machines without a compiled kernel.

The map is divided into square tiles of queries. Each tile attends to the union of its windows as in dense attention,
with batched matrix products, and a bias of minus infinity for positions outside the window of a query. One row of tiles
is processed at a time, which bounds the memory.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.neighborhood_attention.arguments import AttentionArguments, Gradients
from vision_kernels.neighborhood_attention.dilation import backward_on_sub_grids, forward_on_sub_grids
from vision_kernels.neighborhood_attention.reference import neighbours
from vision_kernels.precision import compute_dtype
from vision_kernels.views import contiguous_like

_Results = TypeVar("_Results", bound=tuple)
_TILE = 8
# Logits that are computed at a time. The best measured on CPUs; on a GPU few launches matter more.
_CHUNK_ELEMENTS = {"cpu": 1 << 20}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 27


@dataclass
class _Axis:
    """An axis divided into tiles, the last one padded with copies of the last query.

    [starts, starts + extent) is the union of the windows of the queries of a tile.
    """

    tiles: int
    starts: list[int]
    extent: int
    relative: Tensor  # (tiles, tile, extent) index into the bias table, 2 * kernel_size - 1 outside the window
    inside: Tensor  # (tiles, tile, extent) whether it is in the window of a query that is not padding

    @classmethod
    def of(cls, size: int, kernel_size: int, device: torch.device) -> "_Axis":
        tiles, extent = -(-size // _TILE), min(size, _TILE + kernel_size - 1)
        positions = neighbours(size, kernel_size, 1, device)[0]
        query = torch.arange(tiles * _TILE, device=device).clamp(max=size - 1)
        begin = positions[query, 0].view(tiles, _TILE, 1)
        starts = begin[:, :1].clamp(max=size - extent)
        seen = starts + torch.arange(extent, device=device)
        inside = (seen >= begin) & (seen < begin + kernel_size)
        relative = torch.where(inside, seen - query.view(tiles, _TILE, 1) + kernel_size - 1, 2 * kernel_size - 1)
        real = torch.arange(tiles * _TILE, device=device).view(tiles, _TILE, 1) < size
        return cls(tiles, starts.flatten().tolist(), extent, relative, inside & real)


@dataclass
class _Chunk:
    """A row of tiles of some batch entries; t are its tiles, q the queries of a tile, s the positions of its window."""

    entries: slice
    rows: slice
    window_rows: slice
    bias: Tensor  # (heads, t, q, s)


class _Tiled:
    """Maps of (batch, heads, height, width, dim) and a bias, divided into chunks."""

    def __init__(self, query: Tensor, bias: Tensor | None, kernel_size: int) -> None:
        self.dtype, self.device, self.table = compute_dtype(query), query.device, 2 * kernel_size - 1
        self.batch, self.heads, self.height, self.width, self.dim = query.shape
        self.rows = _Axis.of(self.height, kernel_size, self.device)
        self.columns = _Axis.of(self.width, kernel_size, self.device)
        table = query.new_zeros(1, self.table, self.table) if bias is None else bias
        self.bias = F.pad(table.to(self.dtype), (0, 1, 0, 1), value=float("-inf"))

    def chunks(self) -> Iterator[_Chunk]:
        budget = _CHUNK_ELEMENTS.get(self.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        one = self.heads * self.columns.tiles * _TILE**2 * self.rows.extent * self.columns.extent
        entries = max(1, budget // max(1, one))
        for tile, start in enumerate(self.rows.starts):
            rows = slice(tile * _TILE, min(tile * _TILE + _TILE, self.height))
            bias = self.bias.flatten(1)[:, self._relative(tile)].flatten(-2).flatten(2, 3)
            for entry in range(0, self.batch, entries):
                yield _Chunk(slice(entry, entry + entries), rows, slice(start, start + self.rows.extent), bias)

    def _relative(self, tile: int) -> Tensor:
        """Return indices (t, tile, tile, extent, extent) into the flattened bias."""
        rows = self.rows.relative[tile, :, None, :, None]
        return rows * (self.table + 1) + self.columns.relative[:, None, :, None, :]

    def seen(self, chunk: _Chunk) -> Tensor:
        """Return whether positions are in the window of each query, (t, q, s); false for padding."""
        rows, columns = self.rows.inside[chunk.rows.start // _TILE], self.columns.inside
        return (rows[:, None, :, None] & columns[:, None, :, None, :]).flatten(3).flatten(1, 2)

    def queries(self, chunk: _Chunk, tensor: Tensor) -> Tensor:
        """Return (batch, heads, t, q, dim); the last tile of each axis is padded with zeros."""
        part = tensor[chunk.entries, :, chunk.rows].to(self.dtype)
        missing = (0, 0, 0, self.columns.tiles * _TILE - self.width, 0, _TILE - part.shape[2])
        return F.pad(part, missing).unflatten(3, (-1, _TILE)).movedim(3, 2).flatten(3, 4)

    def queries_back(self, chunk: _Chunk, tiles: Tensor, target: Tensor) -> None:
        """Write tiles, in the shape that `queries` returns, into `target`."""
        part = tiles.unflatten(3, (_TILE, _TILE)).movedim(2, 3).flatten(3, 4)
        target[chunk.entries, :, chunk.rows] = part[:, :, : chunk.rows.stop - chunk.rows.start, : self.width]

    def windows(self, chunk: _Chunk, tensor: Tensor) -> Tensor:
        """Return (batch, heads, t, s, dim)."""
        part = tensor[chunk.entries, :, chunk.window_rows]
        cut = [part[:, :, :, start : start + self.columns.extent] for start in self.columns.starts]
        return torch.stack(cut, dim=2).to(self.dtype).flatten(3, 4)

    def add_windows(self, chunk: _Chunk, grad: Tensor, target: Tensor) -> None:
        """Add the gradient of the result of `windows` to `target`."""
        part = target[chunk.entries, :, chunk.window_rows]
        grad = grad.unflatten(3, (self.rows.extent, self.columns.extent))
        for tile, start in enumerate(self.columns.starts):
            part[:, :, :, start : start + self.columns.extent] += grad[:, :, tile]

    def add_bias(self, chunk: _Chunk, grad: Tensor, target: Tensor) -> None:
        """Add the gradient (batch, heads, t, q, s) of the logits to that of the padded bias, (heads, elements)."""
        relative = self._relative(chunk.rows.start // _TILE)
        target.index_add_(1, relative.flatten(), grad.sum(0).flatten(1))


def _product(weights: Tensor, vectors: Tensor, seen: Tensor | None) -> Tensor:
    """Multiply (..., i, j) and (..., j, dim), restricted to j in `seen` (t, i, j) unless that is None.

    Weights are zero elsewhere, but zero times an infinity or NaN is not zero. Where one of these is seen, the result is
    NaN.
    """
    if seen is None:
        return weights @ vectors
    finite = vectors.isfinite()
    reached = seen.to(vectors.dtype) @ (~finite).to(vectors.dtype) > 0
    return (weights.where(seen, 0) @ vectors.where(finite, 0)).masked_fill(reached, torch.nan)


def _in_windows(compute: Callable[..., _Results], *arguments: Any) -> _Results:
    """Call `compute(*arguments, masked)`, with masks only if a result is not finite, because they take time."""
    results = compute(*arguments, masked=False)
    if all(each is None or each.isfinite().all() for each in results):
        return results
    return compute(*arguments, masked=True)


def _attend(given: AttentionArguments, masked: bool) -> tuple[Tensor]:
    query, key, value, bias, kernel_size, _ = given
    tiled, out = _Tiled(query, bias, kernel_size), contiguous_like(query)
    for chunk in tiled.chunks():
        seen = tiled.seen(chunk) if masked else None
        logits = tiled.queries(chunk, query) @ tiled.windows(chunk, key).transpose(-1, -2)
        weights = _softmax(logits, chunk, seen)
        tiled.queries_back(chunk, _product(weights, tiled.windows(chunk, value), seen), out)
    return (out,)


def _softmax(logits: Tensor, chunk: _Chunk, seen: Tensor | None) -> Tensor:
    """Return the weights; `logits` is overwritten."""
    if seen is not None:  # NaN plus minus infinity is NaN
        logits.masked_fill_(~seen, -torch.inf)
    return logits.add_(chunk.bias).softmax(-1)


def _gradients(grad_out: Tensor, given: AttentionArguments, masked: bool) -> Gradients:
    """Return gradients in compute precision."""
    query, key, value, bias, kernel_size, _ = given
    tiled = _Tiled(query, bias, kernel_size)
    grad_query, grad_key, grad_value = (contiguous_like(each, tiled.dtype).zero_() for each in (query, key, value))
    grad_bias = None if bias is None else torch.zeros_like(tiled.bias).flatten(1)
    for chunk in tiled.chunks():
        queries, keys = tiled.queries(chunk, query), tiled.windows(chunk, key)
        seen = tiled.seen(chunk) if masked else None
        seen_by = None if seen is None else seen.transpose(-1, -2)
        weights = _softmax(queries @ keys.transpose(-1, -2), chunk, seen)
        grads = tiled.queries(chunk, grad_out)
        tiled.add_windows(chunk, _product(weights.transpose(-1, -2), grads, seen_by), grad_value)
        grad_logits = grads @ tiled.windows(chunk, value).transpose(-1, -2)
        if seen is not None:
            grad_logits.masked_fill_(~seen, 0)
        grad_logits -= (grad_logits * weights).sum(-1, keepdim=True)
        grad_logits *= weights
        if seen is not None:
            grad_logits.masked_fill_(~seen, 0)
        tiled.queries_back(chunk, _product(grad_logits, keys, seen), grad_query)
        tiled.add_windows(chunk, _product(grad_logits.transpose(-1, -2), queries, seen_by), grad_key)
        if grad_bias is not None:
            tiled.add_bias(chunk, grad_logits, grad_bias)
    if grad_bias is not None:
        grad_bias = grad_bias.unflatten(1, (tiled.table + 1, -1))[:, :-1, :-1]
    return grad_query, grad_key, grad_value, grad_bias


def forward(given: AttentionArguments) -> Tensor:
    """Return the output with the shape of query."""
    return forward_on_sub_grids(lambda undilated: _in_windows(_attend, undilated)[0], given)


def backward(grad_out: Tensor, given: AttentionArguments) -> Gradients:
    """Return the gradients of query, key, value and bias."""
    return backward_on_sub_grids(functools.partial(_in_windows, _gradients), grad_out, given)
