"""Data sets of images: finding and checking class folders, and decoding that never hides a broken file."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset
from timm.data.readers import add_img_extensions, get_img_extensions
from timm.data.readers.class_map import load_class_map

from mambavision.errors import DataError, UserError

_logger = logging.getLogger(__name__)

add_img_extensions((".bmp", ".gif", ".tif", ".tiff", ".webp"))  # timm looks for .png, .jpg and .jpeg only

SKIPPED = -1  # target of an image that could not be decoded

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "test"),
}


def decode_image(file: str | os.PathLike | BinaryIO, mode: str = "RGB", exif_transpose: bool = False) -> Image.Image:
    """Decode an image completely.

    Images of 16 or 32 bits a channel are scaled to 8 bits; Pillow's own conversion would clip them to white.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: It cannot be decoded.
    """
    image = Image.open(file)
    if exif_transpose:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        full_scale = 65535.0 if values.max(initial=0.0) > 255.0 else 255.0
        image = Image.fromarray((values * (255.0 / full_scale)).clip(0, 255).round().astype(np.uint8))
    return image.convert(mode)


DECODING_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def why_undecodable(error: Exception) -> str:
    """Return the reason for a decoding error, without the object addresses in Pillow's messages."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error)


class FolderDataset(ImageDataset):
    """timm's image folder (or tar) data set, except that a broken file is an error or is counted.

    timm's own class silently returns the next image instead.

    Args:
        root: Folder with a folder of images for each class, or a tar file of one.
        class_map: See timm.
        mode: Colour mode of the images, as Pillow names it.
        exif_transpose: Turn images upright by their EXIF tag.
        skip_corrupt: Count broken files instead: "replace" returns the next image, "mark" a blank one with the target
            `SKIPPED`.
    """

    def __init__(
        self,
        root: Path,
        class_map: str | dict[str, int] = "",
        mode: str = "RGB",
        exif_transpose: bool = False,
        skip_corrupt: Literal["", "replace", "mark"] = "",
    ) -> None:
        super().__init__(str(root), class_map=class_map, input_img_mode=mode)
        self.exif_transpose = exif_transpose
        self.skip_corrupt = skip_corrupt
        self._is_corrupt = torch.zeros(len(self), dtype=torch.bool).share_memory_()  # written by worker processes

    @property
    def corrupt_files(self) -> list[str]:
        """Names of the files skipped so far."""
        return [self.filename(int(index)) for index in self._is_corrupt.nonzero()]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, target = self.reader[index]
        try:
            with file:
                image = decode_image(file, self.input_img_mode, self.exif_transpose)
        except DECODING_ERRORS as error:
            if not self.skip_corrupt:
                raise DataError(
                    f"{self.filename(index, absolute=True)}: cannot be decoded ({why_undecodable(error)}); repair or "
                    "remove it, or leave such files out with --skip-corrupt."
                ) from error
            self._is_corrupt[index] = True
            if self.skip_corrupt == "replace" and not self._is_corrupt.all():
                return self[(index + 1) % len(self)]
            image, target = Image.new(self.input_img_mode, (64, 64)), SKIPPED
        return (image if self.transform is None else self.transform(image)), target


def open_split(
    *,
    data_dir: str | None,
    split: str,
    dataset: str = "",
    class_map: str | dict[str, int] = "",
    channels: int = 3,
    is_training: bool = False,
    download: bool = False,
    batch_size: int = 1,
    seed: int = 42,
    epoch_repeats: int = 0,
    exif_transpose: bool = False,
    skip_corrupt: bool = False,
) -> torch.utils.data.Dataset:
    """Open one split of a data set.

    Args:
        data_dir: Root of the data; for image folders it holds the splits, or is itself the validation split.
        split: Name of the split below `data_dir`, or the path of its folder.
        dataset: timm's data set type; empty for image folders.
        class_map: File, or dictionary from class name to index; empty for folder names in natural order.
        channels: 1 reads grey images, 3 colour.

    Raises:
        DataError: There is no such folder, or it holds no images, or a class folder is empty.
    """
    mode = "L" if channels == 1 else "RGB"
    if dataset not in ("", "folder"):
        return create_dataset(
            dataset,
            root=data_dir,
            split=split,
            is_training=is_training,
            class_map=class_map or None,
            download=download,
            batch_size=batch_size,
            seed=seed,
            repeats=epoch_repeats,
            input_img_mode=mode,
        )
    root = find_split(data_dir, split, may_be_root=not is_training)
    if isinstance(class_map, str) and class_map:
        class_map = _read_class_map(class_map, root)
    elif not class_map and root.is_dir():
        _check_class_folders(root)
    skipping = "" if not skip_corrupt else "replace" if is_training else "mark"
    return FolderDataset(root, class_map, mode, exif_transpose, skipping)


def find_split(data_dir: str | None, split: str, may_be_root: bool) -> Path:
    """Return the folder (or tar file) of a split of an image folder data set."""
    if not data_dir:
        if Path(split).exists():
            return Path(split)
        raise DataError("no data: give the folder of the data set with --data-dir.")
    root = Path(data_dir)
    if not root.exists():
        raise DataError(f"{root}: no such folder; --data-dir needs train/ and val/, each with a folder for each class.")
    names = next((names for names in _SPLIT_NAMES.values() if split in names), ())
    candidates = [root / name for name in dict.fromkeys((split, *names))] + [Path(split)]
    for candidate in candidates:
        if candidate.is_dir() or (candidate.suffix == ".tar" and candidate.is_file()):
            return candidate
    splits_here = [name for names in _SPLIT_NAMES.values() for name in names if (root / name).is_dir()]
    if may_be_root and not splits_here:
        return root
    tried = ", ".join(f"{candidate.name}/" for candidate in candidates[:-1])
    raise DataError(
        f"{root}: has no folder for the split {split!r} (looked for {tried}), each with a folder per class."
    )


def _check_class_folders(root: Path) -> None:
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    if not folders:
        raise DataError(f"{root}: no class folders inside; expected a folder of images for each class.")
    empty = [folder.name for folder in folders if not _has_image(folder)]
    if len(empty) == len(folders):
        raise DataError(f"{root}: no images in its {len(folders)} class folders ({', '.join(get_img_extensions())}).")
    if empty:
        raise DataError(f"{root}: no images in the class folders {_listed(empty)}; fill or remove them.")


def _has_image(folder: Path) -> bool:
    extensions = get_img_extensions(as_set=True)
    return any(
        os.path.splitext(name)[1].lower() in extensions
        for _, _, files in os.walk(folder, followlinks=True)
        for name in files
    )


def _read_class_map(path: str, root: Path) -> dict[str, int]:
    if not (Path(path).is_file() or (root / path).is_file()):
        raise DataError(f"{path}: no such class map; give a text file with a class name on each line.")
    if not path.endswith((".txt", ".pkl")):
        raise UserError(f"{path}: a class map is a text file (.txt) with a class name on each line.")
    return load_class_map(path, str(root))


def class_names(dataset: torch.utils.data.Dataset) -> list[str] | None:
    """Return the names of the classes in the order of their indices, or None if the data set does not know them."""
    mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or getattr(dataset, "class_to_idx", None)
    return sorted(mapping, key=mapping.get) if mapping else None


def check_same_classes(
    expected: list[str] | None, found: list[str] | None, where_expected: str, where_found: str
) -> None:
    """Raise a DataError that lists the difference unless both lists name the same classes in the same order."""
    if expected is None or found is None or expected == found:
        return
    lacking, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if lacking or extra:
        parts = [f"lacks {_listed(lacking)}"] * bool(lacking) + [f"has the unknown {_listed(extra)}"] * bool(extra)
        difference = " and ".join(parts)
    else:
        first = next(index for index, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
        difference = (
            f"has them in another order, first at index {first}: {found[first]!r} instead of {expected[first]!r}"
        )
    raise DataError(f"the classes of {where_found} differ from those of {where_expected}: {where_found} {difference}.")


def _listed(names: list[str], count: int = 5) -> str:
    return ", ".join(map(repr, names[:count])) + (f" and {len(names) - count} more" if len(names) > count else "")


def log_skipped(dataset: torch.utils.data.Dataset, log: Callable[[str], None] = _logger.warning) -> int:
    """Report the files that were skipped in a data set, and return their number."""
    corrupt = getattr(dataset, "corrupt_files", [])
    if corrupt:
        log(f"{len(corrupt)} of {len(dataset)} images could not be decoded and were left out: {_listed(corrupt)}")
    return len(corrupt)
