"""`cross_scan` and `cross_merge`, composed of PyTorch operators.

They are permutations, limited by memory on every device, and the operators that they consist of are differentiated,
compiled and exported by PyTorch. Where their cost matters, `vision_kernels.ss2d` does without them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vision_kernels.arguments import check_dims


class Route(NamedTuple):
    """An order in which the positions of an image are read."""

    by_columns: bool  # column after column instead of row after row
    backwards: bool

    def scan(self, image: Tensor) -> Tensor:
        """Reorder (..., height, width) to (..., length)."""
        sequence = (image.transpose(-2, -1) if self.by_columns else image).flatten(-2)
        return sequence.flip(-1) if self.backwards else sequence

    def merge(self, sequence: Tensor, height: int, width: int) -> Tensor:
        """Reorder (..., length) to (..., height, width)."""
        sequence = sequence.flip(-1) if self.backwards else sequence
        if self.by_columns:
            return sequence.unflatten(-1, (width, height)).transpose(-2, -1)
        return sequence.unflatten(-1, (height, width))

    def step(self, width: int) -> int:
        """Return the distance to the next position of the same row or column, in row-major order."""
        stride = width if self.by_columns else 1
        return -stride if self.backwards else stride


_ROWS, _COLUMNS = Route(False, False), Route(True, False)
_ROWS_BACKWARDS, _COLUMNS_BACKWARDS = Route(False, True), Route(True, True)

ROUTES: dict[str, tuple[Route, Route, Route, Route]] = {
    "cross": (_ROWS, _COLUMNS, _ROWS_BACKWARDS, _COLUMNS_BACKWARDS),
    "unidirectional": (_ROWS, _ROWS, _ROWS, _ROWS),
    "bidirectional": (_ROWS, _ROWS, _ROWS_BACKWARDS, _ROWS_BACKWARDS),
}


def check_routes(operator: str, routes: str) -> None:
    """Require a name of `ROUTES`.

    Raises:
        ValueError: There are no routes of this name.
    """
    if routes not in ROUTES:
        raise ValueError(f"{operator}: routes must be one of {', '.join(ROUTES)}, got {routes!r}")


def cross_scan(x: Tensor, routes: str = "cross") -> Tensor:
    """Read images along four routes (VMamba, Liu et al. 2024, section 4.2, https://arxiv.org/abs/2401.10166).

    Its gradient is `cross_merge`.

    Args:
        x: (batch, dim, height, width), of any dtype.
        routes: "cross": row after row, column after column, and both backwards. "unidirectional": four times row after
            row. "bidirectional": twice row after row, and twice backwards.

    Returns:
        (batch, 4, dim, height * width), contiguous.

    Raises:
        ValueError: `x` has another number of dimensions, or there are no routes of this name.
    """
    check_routes("cross_scan", routes)
    check_dims("cross_scan", "x", x, "batch, dim, height, width")
    return torch.stack([route.scan(x) for route in ROUTES[routes]], dim=1)


def cross_merge(y: Tensor, height: int, width: int, routes: str = "cross") -> Tensor:
    """Put the sequences of four routes back to row-major order and add them up.

    Its gradient is `cross_scan`.

    Args:
        y: (batch, 4, dim, height * width).
        height: Of the image.
        width: Of the image.
        routes: As for `cross_scan`.

    Returns:
        (batch, dim, height * width), contiguous.

    Raises:
        ValueError: `y` has another shape, or there are no routes of this name.
    """
    check_routes("cross_merge", routes)
    check_dims("cross_merge", "y", y, "batch, 4, dim, length")
    if (y.shape[1], y.shape[3]) != (4, height * width):
        expected = (y.shape[0], 4, y.shape[2], height * width)
        raise ValueError(
            f"cross_merge: y has shape {tuple(y.shape)}, expected {expected} "
            f"for an image of height {height} and width {width}"
        )
    return merged(y, height, width, routes).flatten(2)


def merged(y: Tensor, height: int, width: int, routes: str) -> Tensor:
    """Return what `cross_merge` does as an image (batch, dim, height, width), contiguous."""
    first, *others = (route.merge(each, height, width) for route, each in zip(ROUTES[routes], y.unbind(1), strict=True))
    return sum(others, first.contiguous())
