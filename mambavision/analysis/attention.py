"""Attention maps of selective scans and of softmax attention: the weight of each position in the output of another.

Unrolled, a selective scan is a lower triangular matrix between the positions of its sequence, like attention (Liu et
al. 2024, section 4.3, https://arxiv.org/abs/2401.10166). With the states' decay w_i = exp(A (delta_1 + ... + delta_i)),
the weight of the input at j <= i in the output at i is ``sum_n C_i w_i / w_j delta_j B_j``.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mambavision.analysis.recording import AttentionRecord, Layout, ScanRecord
from mambavision.errors import ArgumentError
from mambavision.models.layers import check_choice

Mode = Literal["CB", "CBdt", "CwBw", "CwBdtw", "ww"]
Normalisation = Literal["none", "norm", "absnorm"]

_ROWS = 16  # of the matrix that are computed at once


@dataclass(frozen=True)
class MapKind:
    """Kind of a map of a block's scans; ``str()`` gives the original's name, such as ``a0_norm_CB``.

    Args:
        mode: Weight of position j in position i: "CB": C_i B_j; "CwBw": with the decay w_i / w_j of the states; "ww":
            the decay alone. "CBdt" and "CwBdtw" include the step size delta_j, as in the scan. Weights are summed over
            the states and averaged over the channels.
        route: Route of the scan; "all" for the sum over the routes; "nall" for the mean over the routes after
            normalisation.
        normalisation: Normalisation of the whole matrix of an image: "norm" maps its range to [0, 1]; "absnorm" divides
            the absolute values by the largest; or "none".
        in_order_of_route: Rows and columns in the order in which the route reads the image, instead of row-major
            order; for a single route.

    Raises:
        ValueError: An argument is invalid.
    """

    mode: Mode
    route: int | Literal["all", "nall"] = "all"
    normalisation: Normalisation = "norm"
    in_order_of_route: bool = False

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, Mode)
        check_choice("normalisation", self.normalisation, Normalisation)
        if self.route not in ("all", "nall") and not (isinstance(self.route, int) and self.route >= 0):
            raise ValueError(f"route must be a number from 0 on, 'all' or 'nall', got {self.route!r}")
        if self.in_order_of_route and not isinstance(self.route, int):
            raise ValueError("in_order_of_route is for a single route: the routes have different orders")

    @classmethod
    def parse(cls, name: str) -> "MapKind":
        """Parse the original's name of a kind, ``<route>[_norm|_absnorm]_<mode>``.

        Raises:
            ArgumentError: The name is invalid.
        """
        modes = "|".join(get_args(Mode))
        match = re.fullmatch(rf"(?:a(o?)(\d+)|(n?all))_(?:(norm|absnorm)_)?({modes})", name)
        if match is None:
            raise ArgumentError(
                f"unknown map {name!r}: write a route (a0, a1, ...; ao0, ... in the route's own order; all, nall), "
                f"_norm or _absnorm or neither, and _{', _'.join(get_args(Mode))}; for example all_norm_CB."
            )
        parts: tuple[Any, ...] = match.groups()
        own_order, route, combined, normalisation, mode = parts
        return cls(mode, combined or int(route), normalisation or "none", bool(own_order))

    def __str__(self) -> str:
        route = f"a{'o' * self.in_order_of_route}{self.route}" if isinstance(self.route, int) else self.route
        return "_".join([route, *([] if self.normalisation == "none" else [self.normalisation]), self.mode])


def attention_maps(record: ScanRecord | AttentionRecord, kinds: Iterable[MapKind] = ()) -> dict[str, Tensor]:
    """Return the maps of a block.

    Args:
        record: Result of `record_blocks` for the block.
        kinds: Kinds of maps of a scan; softmax attention has only one map.

    Returns:
        Name -> (batch, windows, length, length), where row i contains the weights of all positions in position i. For
        softmax attention, the mean over the heads under the name "softmax".

    Raises:
        ArgumentError: The scan lacks a route.
    """
    layout = record.layout
    if isinstance(record, AttentionRecord):
        return {"softmax": _by_image(record.weights.mean(dim=1), layout)}
    kinds = list(kinds)
    count = len(record.routes)
    for kind in kinds:
        if isinstance(kind.route, int) and kind.route >= count:
            raise ArgumentError(f"map {kind}: the scan has {count} route{'s' * (count > 1)}, counted from 0.")
    maps = {}
    for mode in dict.fromkeys(kind.mode for kind in kinds):
        matrices = _matrices(record, mode)  # in the order of each route
        by_route = zip(record.routes, matrices.unbind(1), strict=True)
        ordered = [_in_row_major_order(route, each, layout) for route, each in by_route]
        for kind in (kind for kind in kinds if kind.mode == mode):
            if kind.in_order_of_route and isinstance(kind.route, int):
                chosen = normalised(_by_image(matrices[:, kind.route], layout), kind.normalisation)
            elif kind.route == "nall":
                each = [normalised(_by_image(one, layout), kind.normalisation) for one in ordered]
                chosen = torch.stack(each).mean(dim=0)
            else:
                chosen = sum(ordered[1:], ordered[0]) if kind.route == "all" else ordered[kind.route]
                chosen = normalised(_by_image(chosen, layout), kind.normalisation)
            maps[str(kind)] = chosen
    return {str(kind): maps[str(kind)] for kind in kinds}


def positions_read(record: ScanRecord, route: int) -> Tensor:
    """Return a map of a route with 1 for each position j that is read up to position i, and 0 for later ones."""
    matrices = torch.ones_like(record.B[:, 0, 0, :, None] * record.B[:, 0, 0, None]).tril()
    return _by_image(_in_row_major_order(record.routes[route], matrices, record.layout), record.layout)


def _matrices(record: ScanRecord, mode: Mode) -> Tensor:
    """Return (batch x windows, routes, length, length) in the order of each route."""
    Q, K = (torch.ones_like(record.B),) * 2 if mode == "ww" else (record.C, record.B)
    if mode in ("CB", "CBdt"):
        matrices = Q.transpose(-1, -2) @ K
        if mode == "CBdt":
            matrices = matrices * record.delta.mean(dim=2)[:, :, None]
        return matrices.tril()
    by_route = []
    for route, A in enumerate(record.A):  # one by one, to save memory: this has all channels and states
        delta = record.delta[:, route, :, None]  # (batch x windows, dim, 1, length)
        log_w = (delta * A[..., None]).cumsum(dim=-1)
        K_route = K[:, route, None] * delta if mode == "CwBdtw" else K[:, route, None]
        by_route.append(_with_decay(log_w, Q[:, route, None].expand_as(log_w), K_route.expand_as(log_w)) / len(A))
    return torch.stack(by_route, dim=1)


def _with_decay(log_w: Tensor, Q: Tensor, K: Tensor) -> Tensor:
    """Return the sum of Q_i exp(log_w_i - log_w_j) K_j for j <= i over the two dimensions before the last.

    (..., dim, state, length) -> (..., length, length). All exponents are at most zero: w itself underflows in float32
    after some dozen large steps, and the original, which divides by it, has to clamp it to 1e-20.
    """
    length = log_w.shape[-1]
    out = log_w.new_zeros(*log_w.shape[:-3], length, length)
    for start in range(0, length, _ROWS):
        rows = slice(start, min(start + _ROWS, length))
        # The decay from an earlier j to i is the product of the decays from j to the first row, and from there to i.
        first = log_w[..., start, None]
        q = (Q[..., rows] * (log_w[..., rows] - first).exp()).flatten(-3, -2)
        k = (K[..., :start] * (first - log_w[..., :start]).exp()).flatten(-3, -2)
        out[..., rows, :start] = q.transpose(-1, -2) @ k
        decay = (log_w[..., rows, None] - log_w[..., None, rows]).clamp(max=0).exp()
        within = torch.einsum("...dni,...dnij,...dnj->...ij", Q[..., rows], decay, K[..., rows])
        out[..., rows, rows] = within.tril()
    return out


def _in_row_major_order(route, matrices: Tensor, layout: Layout) -> Tensor:
    """Reorder both axes of (batch x windows, length, length) from the order of a route to row-major order."""
    for _ in range(2):
        matrices = route.merge(matrices, *layout.window).flatten(-2).transpose(-1, -2)
    return matrices


def _by_image(matrices: Tensor, layout: Layout) -> Tensor:
    rows, columns = layout.windows
    return matrices.unflatten(0, (-1, rows * columns))


def normalised(matrices: Tensor, how: Normalisation) -> Tensor:
    """Normalise the matrices (batch, windows, length, length) of each image; see `MapKind`."""
    if how == "none":
        return matrices
    if how == "absnorm":
        return matrices.abs() / matrices.abs().amax(dim=(1, 2, 3), keepdim=True)
    least, largest = torch.aminmax(matrices.flatten(1), dim=1)
    least, largest = (each.view(-1, 1, 1, 1) for each in (least, largest))
    return (matrices - least) / (largest - least)


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """Combine the maps of consecutive blocks (Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928).

    The output of each block is taken to be half its input and half the weighted positions of its map.

    Args:
        maps: Non-negative maps (batch, windows, length, length) from the first block to the last.

    Returns:
        Map of the same shape, whose rows sum to one.

    Raises:
        ValueError: A map has negative values.
    """
    combined = torch.eye(maps[0].shape[-1], device=maps[0].device)
    for matrices in maps:
        if matrices.min() < 0:
            raise ValueError("rollout needs maps without negative values: choose normalisation 'norm' or 'absnorm'")
        mixed = matrices + torch.eye(matrices.shape[-1], device=matrices.device)
        combined = mixed / mixed.sum(dim=-1, keepdim=True) @ combined
    return combined


def cell_of_point(layout: Layout, point: tuple[float, float]) -> tuple[int, int]:
    """Return the row and column of the cell of a map that contains a point.

    Args:
        layout: Layout of the map.
        point: x and y, from 0 (left, top) to 1.

    Raises:
        ArgumentError: The point lies outside.
    """
    x, y = point
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ArgumentError(f"point {x:g},{y:g}: lies outside the image; x and y range from 0 (left, top) to 1.")
    return min(int(y * layout.height), layout.height - 1), min(int(x * layout.width), layout.width - 1)


def map_of_point(maps: Tensor, layout: Layout, point: tuple[float, float]) -> Tensor:
    """Return the weights of all cells in the cell of a point: a row of the matrix, arranged as a map.

    Args:
        maps: (batch, windows, length, length) from `attention_maps`.
        layout: Layout of the record.
        point: See `cell_of_point`.

    Returns:
        (batch, height, width); NaN outside the cell's window.

    Raises:
        ArgumentError: The point lies outside.
    """
    row, column = cell_of_point(layout, point)
    height, width = layout.window
    top, left = row // height * height, column // width * width
    window = row // height * layout.windows[1] + column // width
    taken = maps[:, window, (row - top) * width + column - left].unflatten(-1, (height, width))
    whole = maps.new_full((len(maps), layout.height, layout.width), torch.nan)
    inside = whole[:, top : top + height, left : left + width]
    inside.copy_(taken[:, : inside.shape[1], : inside.shape[2]])  # without the padding
    return whole
