"""Contact sheets: pages of small pictures with captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mambavision.files import replacing

_COLUMNS, _ROWS = 10, 6
_SIDE, _LINE, _MARGIN, _FRAME = 112, 16, 8, 3  # pixels
_UNKNOWN, _RIGHT, _WRONG = (190, 190, 190), (46, 160, 67), (207, 34, 46)

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Tile:
    """A picture on a sheet, with its caption."""

    image: Image.Image
    guess: str
    probability: float
    truth: str | None  # None: unknown; otherwise the frame is green or red


def draw_contact_sheets(tiles: Sequence[Tile], folder: Path) -> list[Path]:
    """Draw pictures on as many pages as needed, in `folder`; return the paths of the pages."""
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
    font = ImageFont.load_default(12)
    captions = [_caption(tile, font) for tile in tiles]
    cell_width = _SIDE + _MARGIN
    cell_height = _SIDE + max(map(len, captions)) * _LINE + 4 + _MARGIN
    sheet = Image.new("RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left = _MARGIN + index % columns * cell_width
        top = _MARGIN + index // columns * cell_height
        colour = _UNKNOWN if tile.truth is None else _RIGHT if tile.truth == tile.guess else _WRONG
        draw.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), outline=colour, width=_FRAME)
        picture = _fitted(tile.image, _SIDE - 2 * _FRAME)
        offset = ((_SIDE - picture.width) // 2, (_SIDE - picture.height) // 2)
        sheet.paste(picture, (left + offset[0], top + offset[1]))
        for number, line in enumerate(caption):
            draw.text((left, top + _SIDE + 2 + number * _LINE), line, fill="black", font=font)
    return sheet


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _caption(tile: Tile, font: _Font) -> list[str]:
    """Return one or two lines: guess, probability, and the truth if it differs; only class names are shortened."""
    guess, percent = _first_synonym(tile.guess), f"  {100 * tile.probability:.0f} %"
    if tile.truth in (None, tile.guess):
        return [_shortened(guess, percent, font)]
    truth = f"(is {_first_synonym(tile.truth)}"
    line = f"{guess}{percent} {truth})"
    if font.getlength(line) <= _SIDE:
        return [line]
    return [_shortened(guess, percent, font), _shortened(truth, ")", font)]


def _first_synonym(name: str) -> str:
    return name.split(", ")[0]  # names of ImageNet's classes are lists of synonyms


def _shortened(text: str, rest: str, font: _Font) -> str:
    """Join two texts to one line; the first is shortened to fit."""
    if font.getlength(text + rest) <= _SIDE:
        return text + rest
    while text and font.getlength(text + "…" + rest) > _SIDE:
        text = text[:-1]
    return text + "…" + rest
