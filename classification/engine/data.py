"""Image data sets: finding and checking class folders, and decoding that reports broken files."""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import torch.distributed
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset
from timm.data.readers import add_img_extensions, get_img_extensions
from timm.data.readers.class_map import load_class_map
from torchvision.datasets import DatasetFolder

from engine.options.train import DataOptions
from mambavision.errors import DataError, UserError
from mambavision.inputs import check_tree
from mambavision.running.process import this_process
from mambavision.running.sampling import shared_zeros

_logger = logging.getLogger(__name__)

_FURTHER_EXTENSIONS = (".bmp", ".gif", ".tif", ".tiff", ".webp")

# Data sets of timm, torchvision and this module have a length and a transform, which torch's Dataset lacks.
ImageData = Any

SKIPPED = -1  # target of an image that could not be decoded

Skipping = Literal["", "replace", "mark"]

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "test"),
}


@cache
def image_extensions() -> frozenset[str]:
    """Return the extensions of image files, in lower case, after adding those that timm lacks to its list."""
    add_img_extensions(_FURTHER_EXTENSIONS)
    return frozenset(get_img_extensions(as_set=True))


def decode_image(file: str | os.PathLike | BinaryIO, mode: str = "RGB", exif_transpose: bool = False) -> Image.Image:
    """Decode an image completely.

    Images with 16 or 32 bits per channel are scaled to 8 bits; Pillow's own conversion would clip them to white.

    Args:
        file: Path of an image, or an open file.
        mode: Colour mode of the result, as named by Pillow.
        exif_transpose: Rotate the image by its EXIF tag.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: The image cannot be decoded.
    """
    image: Image.Image = Image.open(file)
    if exif_transpose:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        full_scale = _full_scale(image.mode, values.max(initial=0.0))
        image = Image.fromarray((values * (255.0 / full_scale)).clip(0, 255).round().astype(np.uint8))
    return image.convert(mode)


def _full_scale(mode: str, largest: float) -> float:
    """Return the value of white: from the mode or, where that is ambiguous, from the largest value."""
    if mode.startswith("I;16"):
        return 2.0**16 - 1
    candidates = (1.0, 2.0**8 - 1, 2.0**16 - 1) if mode == "F" else (2.0**16 - 1, 2.0**31 - 1)
    return next((scale for scale in candidates if largest <= scale), candidates[-1])


def image_mode(channels: int) -> str:
    """Return Pillow's colour mode for a number of channels.

    Raises:
        UserError: Image files do not provide so many channels.
    """
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise UserError(f"the model takes {channels} channels, but image files have 1 (grey) or 3 (colour).")
    return modes[channels]


DECODING_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def why_undecodable(error: Exception) -> str:
    """Return the reason for a decoding error, without the object addresses in Pillow's messages."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or str(error)


class FolderDataset(ImageDataset):
    """timm's data set of an image folder (or tar file), except that broken files raise an error or are counted.

    timm's own class silently returns the next image instead.

    Args:
        root: Folder with a subfolder of images for each class, or a tar file of it.
        class_map: Class map of timm: a file, or a dictionary from class name to index.
        mode: Colour mode of the images, as named by Pillow.
        exif_transpose: Rotate images by their EXIF tag.
        skip_corrupt: Count broken files instead of raising an error: "replace" returns the next image, "mark" a blank
            image with the target `SKIPPED`.

    Raises:
        DataError: There are no images.
    """

    def __init__(
        self,
        root: Path,
        class_map: str | dict[str, int] = "",
        mode: str = "RGB",
        exif_transpose: bool = False,
        skip_corrupt: Skipping = "",
    ) -> None:
        image_extensions()  # for timm's search of the folder
        try:
            super().__init__(str(root), class_map=class_map, input_img_mode=mode)
        except RuntimeError as error:  # timm's, if it finds nothing
            classes = f" of the classes {_listed(list(class_map))} in the class map" if class_map else ""
            raise DataError(f"{root}: no images{classes}.") from error
        self.root = root
        self.exif_transpose = exif_transpose
        self.skip_corrupt = skip_corrupt
        self._is_corrupt = shared_zeros(len(self), torch.bool)  # written by worker processes

    @property
    def corrupt_files(self) -> list[str]:
        """Names of the files skipped so far."""
        return [self.filename(int(index)) for index in self._is_corrupt.nonzero()]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self._read(index)
        while image is None and self.skip_corrupt == "replace":
            if self._is_corrupt.all():
                raise DataError(f"{self.root}: none of its {len(self)} images can be decoded.")
            index = (index + 1) % len(self)
            image, target = self._read(index)
        if image is None:
            image, target = Image.new(self.input_img_mode, (64, 64)), SKIPPED
        return (image if self.transform is None else self.transform(image)), target

    def _read(self, index: int) -> tuple[Image.Image | None, int]:
        """Return image and target; no image if the file is broken and such files are skipped."""
        try:
            file, target = self.reader[index]  # the file may have been deleted during the run
            with file:
                return decode_image(file, self.input_img_mode, self.exif_transpose), target
        except DECODING_ERRORS as error:
            if not self.skip_corrupt:
                raise DataError(
                    f"{self.filename(index, absolute=True)}: cannot be decoded ({why_undecodable(error)}); repair or "
                    "remove it, or leave such files out with --skip-corrupt."
                ) from error
            self._is_corrupt[index] = True
            return None, SKIPPED


def is_folder(dataset: str) -> bool:
    """Return True if a data set type means image folders, which this module reads, instead of one of timm's."""
    return dataset in ("", "folder")


def is_stream(dataset: str) -> bool:
    """Return True if timm reads a data set type sequentially, without access to single images."""
    return dataset.lower().startswith(("hfids/", "tfds/", "wds/"))


def check_data_options(dataset: str, skip_corrupt: bool, exif_transpose: bool | None) -> None:
    """Raise a UserError for options that timm's data sets do not support."""
    for flag, is_set in (("--skip-corrupt", skip_corrupt), ("--exif-transpose", exif_transpose)):
        if is_set and not is_folder(dataset):
            raise UserError(f"{flag} works with image folders only; remove it, or --dataset {dataset}.")


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
) -> ImageData:
    """Open one split of a data set.

    Args:
        data_dir: Root of the data; for image folders it contains the splits, or is the validation split itself.
        split: Name of the split below `data_dir`, or the path of its folder.
        dataset: timm's data set type; empty for image folders.
        class_map: File, or dictionary from class name to index; empty for folder names in natural order.
        channels: 1 for grey images, 3 for colour.
        download: Let timm download the data set; in distributed runs, once per machine.

    Raises:
        DataError: The folder does not exist or contains no images, or a class folder is empty.
        UserError: Image files do not provide so many channels.
    """
    mode = image_mode(channels)
    if not is_folder(dataset):
        create: Callable[[], ImageData] = partial(
            create_dataset,
            dataset,
            root=data_dir,
            split=split,
            is_training=is_training,
            class_map=class_map or None,  # type: ignore[arg-type]  # a file or None, too, whatever timm's stub says
            download=download,
            batch_size=batch_size,
            seed=seed,
            repeats=epoch_repeats,
            input_img_mode=mode,
        )
        opened = _one_after_the_other(create) if download else create()
        if isinstance(opened, DatasetFolder):
            check_tree(Path(opened.root), opened.extensions)
            opened.loader = partial(_decode_or_name, mode=mode)
        return opened
    root = find_split(data_dir, split, may_be_root=not is_training)
    if root.is_dir():
        check_tree(root, image_extensions())
    if isinstance(class_map, str) and class_map:
        class_map = _read_class_map(class_map, root)
    elif not class_map and root.is_dir():
        _check_class_folders(root)
    skipping: Skipping = "" if not skip_corrupt else "replace" if is_training else "mark"
    return FolderDataset(root, class_map, mode, exif_transpose, skipping)


def open_training_data(
    options: DataOptions, batch_sizes: tuple[int, int], channels: int, seed: int
) -> tuple[ImageData, ImageData, list[str] | None]:
    """Open the training and validation data of train.py; return them and the names of their classes.

    Args:
        options: Options of the data.
        batch_sizes: Batch sizes in training and validation.
        channels: Channels of the images.
        seed: Seed of the run.

    Raises:
        DataError: As for `open_split`, or the classes differ.
    """
    splits = ("train", "val") if options.lmdb_dataset else (options.train_split, options.val_split)
    if options.lmdb_dataset and "lmdb" in (options.data_dir or ""):
        raise UserError("--lmdb-dataset: LMDB files cannot be read; unpack them into the folders train/ and val/.")
    common: dict[str, Any] = {
        "data_dir": options.data_dir,
        "dataset": options.dataset,
        "class_map": options.class_map,
        "channels": channels,
        "download": options.dataset_download,
        "seed": seed,
        "exif_transpose": options.exif_transpose,
        "skip_corrupt": options.skip_corrupt,
    }
    train = open_split(
        split=splits[0], is_training=True, batch_size=batch_sizes[0], epoch_repeats=options.epoch_repeats, **common
    )
    validation = open_split(split=splits[1], batch_size=batch_sizes[1], **common)
    names = class_names(train)
    check_same_classes(names, class_names(validation), "the training data", "the validation data")
    return train, validation, names


def _decode_or_name(file: str, mode: str) -> Image.Image:
    try:
        return decode_image(file, mode)
    except DECODING_ERRORS as error:
        raise DataError(f"{file}: cannot be decoded ({why_undecodable(error)}); repair or remove it.") from error


def _one_after_the_other(download: Callable[[], ImageData]) -> ImageData:
    """Download in the first process, then in one process of every other machine, then open the files in the others."""
    process = this_process()
    if not process.is_distributed:
        return download()
    # A download may exceed the timeout of the default group.
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    own_turn = 0 if process.is_first else 1 if process.local_rank == 0 else 2
    for turn in range(3):
        if turn == own_turn:
            dataset = download()
        torch.distributed.barrier(group)
    torch.distributed.destroy_process_group(group)
    return dataset


def find_split(data_dir: str | None, split: str, may_be_root: bool) -> Path:
    """Return the folder (or tar file) of a split of an image folder data set.

    Raises:
        DataError: There is none.
    """
    is_path = Path(split).name != split  # not a name, even if the working directory has a folder of that name
    if not data_dir:
        if is_path and Path(split).exists():
            return Path(split)
        raise DataError("no data: give the folder of the data set with --data-dir.")
    root = Path(data_dir)
    if not root.exists():
        raise DataError(f"{root}: no such folder; --data-dir needs train/ and val/, each with a folder per class.")
    names = next((names for names in _SPLIT_NAMES.values() if split in names), ())
    candidates = [root / name for name in dict.fromkeys((split, *names))]
    for candidate in candidates + [Path(split)] * is_path:
        if candidate.is_dir() or (candidate.suffix == ".tar" and candidate.is_file()):
            return candidate
    splits_here = [name for names in _SPLIT_NAMES.values() for name in names if (root / name).is_dir()]
    if may_be_root and names and not splits_here:
        return root
    tried = ", ".join(f"{candidate.name}/" for candidate in candidates)
    raise DataError(
        f"{root}: has no folder for the split {split!r} (looked for {tried}), each with a folder per class."
    )


def _check_class_folders(root: Path) -> None:
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    if not folders:
        raise DataError(f"{root}: no class folders inside; expected a folder of images for each class.")
    empty = [folder.name for folder in folders if not _has_image(folder)]
    if len(empty) == len(folders):
        raise DataError(
            f"{root}: no images in its {len(folders)} class folders ({', '.join(sorted(image_extensions()))})."
        )
    if empty:
        raise DataError(f"{root}: no images in the class folders {_listed(empty)}; fill or remove them.")


def _has_image(folder: Path) -> bool:
    extensions = image_extensions()
    return any(
        os.path.splitext(name)[1].lower() in extensions
        for _, _, files in os.walk(folder, followlinks=True)
        for name in files
    )


def _read_class_map(path: str, root: Path) -> dict[str, int]:
    if not (Path(path).is_file() or (root / path).is_file()):
        raise DataError(f"{path}: no such class map; give a text file with a class name on each line.")
    if not path.endswith(".txt"):  # timm would unpickle other files, which can run any code
        raise UserError(f"{path}: a class map is a text file (.txt) with a class name on each line.")
    return load_class_map(path, str(root))


def class_names(dataset: ImageData) -> list[str] | None:
    """Return the names of the classes in the order of their indices, or None if they are unknown."""
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


def log_skipped(dataset: ImageData, log: Callable[[str], None] = _logger.warning) -> int:
    """Report the files that were skipped in a data set, and return their number."""
    corrupt = getattr(dataset, "corrupt_files", [])
    if corrupt:
        log(f"{len(corrupt)} of {len(dataset)} images could not be decoded and were left out: {_listed(corrupt)}")
    return len(corrupt)
