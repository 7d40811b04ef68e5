"""The routes along which an image is read as a sequence."""

from typing import NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """An order in which the positions of an image are read."""

    by_columns: bool  # instead of by rows
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
    """Require a name in `ROUTES`.

    Raises:
        ValueError: `routes` is unknown.
    """
    if routes not in ROUTES:
        raise ValueError(f"{operator}: routes must be one of {', '.join(ROUTES)}, got {routes!r}")


def summation_dtype(sequences: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32 for 16-bit dtypes, which are rounded once at the end, otherwise their own."""
    return torch.float32 if sequences.dtype in (torch.bfloat16, torch.float16) else sequences.dtype
