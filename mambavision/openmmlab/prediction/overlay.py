"""Pictures of segmentations: the image with coloured classes, and a legend."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mambavision.text import escaped

_LEGEND_WIDTH, _LINE_HEIGHT, _MARGIN = 180, 20, 6  # pixels
_MIN_LINES = 8
_PAPER, _INK = (255, 255, 255), (30, 30, 30)


class Overlay:
    """Draws segmentations.

    Args:
        classes: Names of the classes.
        palette: Red, green and blue of each, 0 to 255.
        opacity: Opacity of the colours over the image, from 0 to 1.
    """

    def __init__(self, classes: Sequence[str], palette: Sequence[Sequence[int]], opacity: float = 0.5) -> None:
        self._classes, self._opacity = [escaped(name) for name in classes], opacity
        self._palette = np.array(palette, np.uint8)
        self._font = ImageFont.load_default(size=12)

    def draw(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return an image with its segmentation and, to the right, a legend with the largest classes first.

        The size depends only on that of the image, as required for videos.

        Args:
            image: (H, W, 3) uint8 in the order blue, green, red.
            mask: (H, W) class numbers.
        """
        height, width = mask.shape
        colours = self._palette[mask][..., ::-1]
        mixed = np.round(image * (1 - self._opacity) + colours * self._opacity).astype(np.uint8)
        rows = max(height, _MIN_LINES * _LINE_HEIGHT)
        rows += rows % 2  # required by video codecs
        columns = width + width % 2
        picture = np.full((rows, columns + _LEGEND_WIDTH, 3), _PAPER, np.uint8)
        picture[:height, :width] = mixed
        picture[:, columns:] = self._legend(mask, rows)
        return picture

    def _legend(self, mask: np.ndarray, height: int) -> np.ndarray:
        picture = Image.new("RGB", (_LEGEND_WIDTH, height), _PAPER)
        pen = ImageDraw.Draw(picture)
        numbers, counts = np.unique(mask, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        lines = height // _LINE_HEIGHT
        shown = order if len(order) <= lines else order[: lines - 1]
        for line, index in enumerate(shown):
            top = line * _LINE_HEIGHT
            share = 100 * counts[index] / mask.size
            share = f"{share:.0f} %" if share >= 0.5 else "<1 %"
            name = self._fitted(self._classes[numbers[index]], share)
            box = (_MARGIN, top + 4, _MARGIN + 14, top + _LINE_HEIGHT - 4)
            pen.rectangle(box, fill=tuple(self._palette[numbers[index]].tolist()), outline=_INK)
            pen.text((_MARGIN + 20, top + 3), name, fill=_INK, font=self._font)
            pen.text((_LEGEND_WIDTH - _MARGIN, top + 3), share, fill=_INK, font=self._font, anchor="ra")
        if len(shown) < len(order):
            text = f"and {len(order) - len(shown)} more"
            pen.text((_MARGIN + 20, len(shown) * _LINE_HEIGHT + 3), text, fill=_INK, font=self._font)
        return np.asarray(picture)[..., ::-1]

    def _fitted(self, name: str, share: str) -> str:
        """Shorten a name so that it fits on a line with the percentage to its right."""
        room = _LEGEND_WIDTH - 3 * _MARGIN - 20 - self._font.getlength(share)
        shortened = name
        while self._font.getlength(shortened) > room:
            shortened = shortened.rstrip("…")[:-1] + "…"
        return shortened
