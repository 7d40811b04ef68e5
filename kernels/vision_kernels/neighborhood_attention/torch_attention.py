"""Neighborhood attention in plain PyTorch, for machines without a compiled kernel.

The map is cut into square tiles of queries. Each tile attends to the union of its windows as in dense attention, with
batched matrix products, and a bias of minus infinity where a position is outside of the window of a query. One row of
tiles is handled at a time, which bounds the memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.neighborhood_attention.dilation import backward_on_sub_grids, forward_on_sub_grids
from vision_kernels.neighborhood_attention.reference import neighbours
from vision_kernels.precision import compute_dtype

_TILE = 8
# Logits that are handled at a time. Measured best on CPUs; a GPU wants few launches instead.
_CHUNK_ELEMENTS = {"cpu": 1 << 20}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 27


@dataclass
class _Axis:
    """An axis cut into tiles, the last one filled up with copies of the last query.

    Each tile has the window [starts, starts + extent) in common, the union of those of its queries.
    """

    tiles: int
    starts: list[int]
    extent: int
    relative: Tensor  # (tiles, tile, extent) index into the bias table, 2 * kernel_size - 1 outside of the window

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
        return cls(tiles, starts.flatten().tolist(), extent, relative)


@dataclass
class _Chunk:
    """A row of tiles of some batch entries; t are its tiles, q the queries of a tile, s the positions they see."""

    entries: slice
    rows: slice
    window_rows: slice
    bias: Tensor  # (heads, t, q, s)


class _Tiled:
    """Maps of (batch, heads, height, width, dim) and a bias, cut into chunks."""

    def __init__(self, query: Tensor, bias: Tensor | None, kernel_size: int):
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

    def queries(self, chunk: _Chunk, tensor: Tensor) -> Tensor:
        """Return (batch, heads, t, q, dim); zeros fill up the last tile of each axis."""
        part = tensor[chunk.entries, :, chunk.rows].to(self.dtype)
        missing = (0, 0, 0, self.columns.tiles * _TILE - self.width, 0, _TILE - part.shape[2])
        return F.pad(part, missing).unflatten(3, (-1, _TILE)).movedim(3, 2).flatten(3, 4)

    def queries_back(self, chunk: _Chunk, tiles: Tensor, target: Tensor) -> None:
        """Write what `queries` would return into `target`."""
        part = tiles.unflatten(3, (_TILE, _TILE)).movedim(2, 3).flatten(3, 4)
        target[chunk.entries, :, chunk.rows] = part[:, :, : chunk.rows.stop - chunk.rows.start, : self.width]

    def windows(self, chunk: _Chunk, tensor: Tensor) -> Tensor:
        """Return (batch, heads, t, s, dim)."""
        part = tensor[chunk.entries, :, chunk.window_rows]
        cut = [part[:, :, :, start : start + self.columns.extent] for start in self.columns.starts]
        return torch.stack(cut, dim=2).to(self.dtype).flatten(3, 4)

    def add_windows(self, chunk: _Chunk, grad: Tensor, target: Tensor) -> None:
        """Add the gradient of what `windows` returns to `target`."""
        part = target[chunk.entries, :, chunk.window_rows]
        grad = grad.unflatten(3, (self.rows.extent, self.columns.extent))
        for tile, start in enumerate(self.columns.starts):
            part[:, :, :, start : start + self.columns.extent] += grad[:, :, tile]

    def add_bias(self, chunk: _Chunk, grad: Tensor, target: Tensor) -> None:
        """Add the gradient (batch, heads, t, q, s) of the logits to that of the padded bias, (heads, elements)."""
        relative = self._relative(chunk.rows.start // _TILE)
        target.index_add_(1, relative.flatten(), grad.sum(0).flatten(1))


def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernel_size: int) -> Tensor:
    tiled = _Tiled(query, bias, kernel_size)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for chunk in tiled.chunks():
        logits = tiled.queries(chunk, query) @ tiled.windows(chunk, key).transpose(-1, -2)
        weights = logits.add_(chunk.bias).softmax(-1)
        tiled.queries_back(chunk, weights @ tiled.windows(chunk, value), out)
    return out


def _backward(grad_out, query, key, value, bias, kernel_size: int) -> tuple[Tensor | None, ...]:
    """Return gradients in compute precision."""
    tiled = _Tiled(query, bias, kernel_size)
    grad_query, grad_key, grad_value = (
        torch.zeros_like(each, dtype=tiled.dtype, memory_format=torch.contiguous_format) for each in (query, key, value)
    )
    grad_bias = None if bias is None else torch.zeros_like(tiled.bias).flatten(1)
    for chunk in tiled.chunks():
        queries, keys = tiled.queries(chunk, query), tiled.windows(chunk, key)
        weights = (queries @ keys.transpose(-1, -2)).add_(chunk.bias).softmax(-1)
        grads = tiled.queries(chunk, grad_out)
        tiled.add_windows(chunk, weights.transpose(-1, -2) @ grads, grad_value)
        grad_logits = grads @ tiled.windows(chunk, value).transpose(-1, -2)
        grad_logits -= (grad_logits * weights).sum(-1, keepdim=True)
        grad_logits *= weights
        tiled.queries_back(chunk, grad_logits @ keys, grad_query)
        tiled.add_windows(chunk, grad_logits.transpose(-1, -2) @ queries, grad_key)
        if grad_bias is not None:
            tiled.add_bias(chunk, grad_logits, grad_bias)
    if grad_bias is not None:
        grad_bias = grad_bias.unflatten(1, (tiled.table + 1, -1))[:, :-1, :-1]
    return grad_query, grad_key, grad_value, grad_bias


def neighborhood_attention_torch(*arguments) -> Tensor:
    """Return the output with the shape and dtype of query. Shapes as in `vision_kernels.neighborhood_attention`."""
    return forward_on_sub_grids(_forward, *arguments)


def neighborhood_attention_torch_backward(*arguments) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and bias (None without a bias)."""
    return backward_on_sub_grids(_backward, *arguments)
