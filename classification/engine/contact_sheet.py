"""Pages of small pictures with captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mambavision.checkpoint import replacing

_COLUMNS, _ROWS = 10, 6
_SIDE, _CAPTION, _MARGIN, _FRAME = 112, 20, 8, 3  # pixels
_UNKNOWN, _RIGHT, _WRONG = (190, 190, 190), (46, 160, 67), (207, 34, 46)


@dataclass(frozen=True)
class Tile:
    """A picture on the sheet."""

    image: Image.Image
    caption: str
    is_right: bool | None  # None: not known; otherwise the frame is green or red


def draw_contact_sheets(tiles: Sequence[Tile], folder: Path) -> list[Path]:
    """Draw as many pages as needed into `folder`, and return their paths."""
    per_page = _COLUMNS * _ROWS
    pages = [tiles[start : start + per_page] for start in range(0, len(tiles), per_page)]
    paths = []
    for number, page in enumerate(pages, 1):
        path = folder / ("contact_sheet.png" if len(pages) == 1 else f"contact_sheet_{number}.png")
        with replacing(path) as file:
            _draw(page).save(file, format="PNG", optimize=True)
        paths.append(path)
    return paths


def _draw(tiles: Sequence[Tile]) -> Image.Image:
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    cell_width, cell_height = _SIDE + _MARGIN, _SIDE + _CAPTION + _MARGIN
    sheet = Image.new("RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for index, tile in enumerate(tiles):
        left = _MARGIN + index % columns * cell_width
        top = _MARGIN + index // columns * cell_height
        colour = {None: _UNKNOWN, True: _RIGHT, False: _WRONG}[tile.is_right]
        draw.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), outline=colour, width=_FRAME)
        picture = _fitted(tile.image, _SIDE - 2 * _FRAME)
        offset = ((_SIDE - picture.width) // 2, (_SIDE - picture.height) // 2)
        sheet.paste(picture, (left + offset[0], top + offset[1]))
        draw.text((left, top + _SIDE + 2), _shortened(tile.caption, font, _SIDE), fill="black", font=font)
    return sheet


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    return image.resize(size, Image.Resampling.BICUBIC)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
