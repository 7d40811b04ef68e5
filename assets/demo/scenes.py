"""Data sets for demos and tests: handwritten digits on photographs, in the formats of COCO and ADE20K.

Digits and photographs come with scikit-learn: 1797 scans of 8x8 pixels from the UCI repository, and two photographs
from Flickr, china.jpg by danielbuechele and flower.jpg by vultilion (CC BY 2.0). Training and validation pictures use
different scans and different parts of the photographs.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import mmcv
import numpy as np

from mambavision.errors import OutputError
from mambavision.files import replacing

Layout = Literal["coco", "ade20k"]
CLASSES = tuple("0123456789")
SPLITS = {"train": "training", "val": "validation"}  # COCO's and ADE20K's names

_MARKER = "scenes.json"
_HELD_OUT_EVERY = 5  # scans
_HELD_OUT_PART = 0.3  # of the width of photographs, on the left
_CROP_SIDES = (96, 192)  # pixels of photographs
_MIN_CONTRAST = 80  # of 255, between a digit and the mean of its background
_ATTEMPTS = 20  # at finding a free place for a digit


@dataclass(frozen=True)
class Options:
    """Content of a data set. The same options give the same pictures.

    Attributes:
        train: Number of training pictures.
        val: Number of validation pictures.
        side: Height and width of the pictures in pixels.
        digit_sides: Range of the side of a scan in pixels, before rotation.
        most: Maximum number of digits in a picture.
        angle: Maximum rotation of the digits in degrees.
        seed: Random seed.
    """

    train: int = 1200
    val: int = 300
    side: int = 160
    digit_sides: tuple[int, int] = (36, 72)
    most: int = 4
    angle: float = 20
    seed: int = 0


@dataclass(frozen=True)
class Digit:
    """A digit in a picture.

    Attributes:
        scan: Index of the scan.
        label: The digit, 0 to 9.
        mask: (side, side) bool.
    """

    scan: int
    label: int
    mask: np.ndarray

    @property
    def box(self) -> list[int]:
        """Bounds of the mask as x, y, width, height, in pixels."""
        (top, bottom), (left, right) = (np.flatnonzero(self.mask.any(axis))[[0, -1]].tolist() for axis in (1, 0))
        return [left, top, right + 1 - left, bottom + 1 - top]


def write_scenes(root: str | Path, layout: Layout, options: Options | None = None) -> bool:
    """Write a data set to a folder, unless it already exists.

    Args:
        root: The folder. A data set that was written there with other options, by another version of this module, or
            incompletely is replaced.
        layout: "coco" for ``{train,val}/*.jpg`` and ``annotations/instances_{train,val}.json`` with masks as run
            lengths; "ade20k" for ``images/{training,validation}/*.jpg`` and ``annotations/{training,validation}/*.png``
            with 1 for the background and 2 to 11 for the digits; 0 means no class and does not occur.
        options: Content of the data set.

    Returns:
        True if it was written, False if it existed.

    Raises:
        OutputError: The folder contains other files.
    """
    root, options = Path(root), options or Options()
    marker = root / _MARKER
    program = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    wanted = {"layout": layout, **asdict(options), "digit_sides": list(options.digit_sides), "program": program}
    if marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8")) == {**wanted, "complete": True}:
            return False
        shutil.rmtree(root)
    elif root.is_dir() and any(root.iterdir()):
        raise OutputError(f"{root}: contains files that do not belong to this data set; choose a new folder.")
    _write_json(marker, {**wanted, "complete": False})
    for split in SPLITS:
        {"coco": _write_coco, "ade20k": _write_ade20k}[layout](root, split, options)
    _write_json(marker, {**wanted, "complete": True})
    return True


@cache
def scan_numbers(split: str) -> np.ndarray:
    """Return the indices of the scans that a split's pictures use."""
    numbers = np.arange(len(_scans()[1]))
    return numbers[(numbers % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1) == (split == "val")]


def scenes(split: str, options: Options) -> Iterator[tuple[np.ndarray, list[Digit]]]:
    """Yield the pictures of a split, (side, side, 3) uint8 in BGR order, with their digits."""
    for number in range(getattr(options, split)):
        random = np.random.default_rng([options.seed, list(SPLITS).index(split), number])
        picture = _paper(random, split, options.side)
        free = np.ones(picture.shape[:2], bool)
        digits = [_add_digit(random, split, options, picture, free) for _ in range(random.integers(options.most) + 1)]
        yield picture.round().astype(np.uint8), [digit for digit in digits if digit]


def _paper(random: np.random.Generator, split: str, side: int) -> np.ndarray:
    """Return a random crop of a photograph, possibly mirrored, (side, side, 3)."""
    photograph = _photographs()[random.integers(len(_photographs()))]
    border = int(photograph.shape[1] * _HELD_OUT_PART)
    photograph = photograph[:, :border] if split == "val" else photograph[:, border:]
    crop = random.integers(_CROP_SIDES[0], min(_CROP_SIDES[1], *photograph.shape[:2]) + 1)
    top, left = (random.integers(length - crop + 1) for length in photograph.shape[:2])
    picture = photograph[top : top + crop, left : left + crop]
    picture = mmcv.imresize(picture, (side, side), interpolation="area" if crop > side else "bilinear")
    return (picture[:, ::-1] if random.random() < 0.5 else picture).astype(np.float32)


def _add_digit(
    random: np.random.Generator, split: str, options: Options, picture: np.ndarray, free: np.ndarray
) -> Digit | None:
    """Draw a digit at a free place of a picture, and return it; None if no place was found.

    Args:
        random: Random number generator.
        split: Split whose scans are used.
        options: Content of the data set.
        picture: (side, side, 3), modified in place.
        free: (side, side) bool, True where there is no digit yet; modified in place.
    """
    images, labels = _scans()
    scan = int(random.choice(scan_numbers(split)))
    scan_side = int(random.integers(options.digit_sides[0], options.digit_sides[1] + 1))
    ink = mmcv.imresize(images[scan], (scan_side, scan_side), interpolation="bicubic")
    ink = mmcv.imrotate(ink, random.uniform(-options.angle, options.angle), auto_bound=True)
    rows, columns = (np.flatnonzero((ink >= 0.5).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    for _ in range(_ATTEMPTS):
        top, left = random.integers(options.side - height + 1), random.integers(options.side - width + 1)
        place = np.s_[top : top + height, left : left + width]
        if free[place].all():
            break
    else:
        return None
    free[place] = False
    mask = np.zeros_like(free)
    mask[place] = ink >= 0.5
    opacity = np.clip((ink - 0.5) * scan_side / 16 + 0.5, 0, 1)[..., None]  # edges one or two pixels wide
    picture[place] += opacity * (_colour(random, picture[mask].mean(0)) - picture[place])
    return Digit(scan, int(labels[scan]), mask)


def _colour(random: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """Return a random colour that contrasts with another."""
    luminance = np.array([0.114, 0.587, 0.299])
    while True:
        colour = random.uniform(0, 255, 3)
        if abs((colour - under) @ luminance) >= _MIN_CONTRAST:
            return colour


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Return the scans, (1797, 8, 8) from 0 for paper to 1 for ink, and their digits."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    return scans.images.astype(np.float32) / 16, scans.target


@cache
def _photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return [np.ascontiguousarray(image[..., ::-1]) for image in load_sample_images().images]


def _write_coco(root: Path, split: str, options: Options) -> None:
    images, annotations = [], []
    for number, (picture, digits) in enumerate(scenes(split, options)):
        name = f"{number:05d}.jpg"
        mmcv.imwrite(picture, str(root / split / name))
        images.append({"id": number, "file_name": name, "height": options.side, "width": options.side})
        annotations += [
            {
                "id": len(annotations) + index + 1,  # COCO's evaluation treats 0 as no annotation
                "image_id": number,
                "category_id": digit.label,
                "bbox": digit.box,
                "area": int(digit.mask.sum()),
                "segmentation": _run_lengths(digit.mask),
                "iscrowd": 0,
                "scan": digit.scan,
            }
            for index, digit in enumerate(digits)
        ]
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES)]
    contents = {"images": images, "annotations": annotations, "categories": categories}
    _write_json(root / "annotations" / f"instances_{split}.json", contents)


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's uncompressed run-length encoding: column by column, beginning with zeros."""
    pixels = mask.ravel(order="F")
    borders = np.flatnonzero(np.diff(pixels, prepend=False)).tolist()
    counts = np.diff([0, *borders, pixels.size]).tolist()
    return {"size": list(mask.shape), "counts": counts}


def _write_ade20k(root: Path, split: str, options: Options) -> None:
    for number, (picture, digits) in enumerate(scenes(split, options)):
        classes = np.ones(picture.shape[:2], np.uint8)
        for digit in digits:
            classes[digit.mask] = 2 + digit.label
        for folder, image, suffix in (("images", picture, "jpg"), ("annotations", classes, "png")):
            mmcv.imwrite(image, str(root / folder / SPLITS[split] / f"{number:05d}.{suffix}"))


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(contents).encode())
