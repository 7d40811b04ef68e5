"""Images and videos of the prediction programs: finding, reading and preprocessing them."""

import glob
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv.transforms import Compose
from mmengine.config import Config
from PIL import Image, UnidentifiedImageError

from mambavision.errors import DataError
from mambavision.inputs import find_files
from mambavision.openmmlab.config import pipeline_owner
from mambavision.running.progress import progress
from mambavision.text import nearest

IMAGES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
_KEPT_FORMATS = {".jpeg", ".jpg", ".png"}
_FALLBACK_FPS = 25.0  # for videos without this information

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An image or video file, and the path of its result relative to the output folder."""

    path: Path
    result: PurePath
    length: int = 1  # frames according to the file, which may be wrong
    fps: float | None = None  # None for images
    size: tuple[int, int] = (1, 1)  # height and width, upright

    @property
    def is_video(self) -> bool:
        return self.fps is not None


@dataclass(frozen=True)
class Frame:
    """An image, or one frame of a video."""

    source: Source
    index: int
    image: np.ndarray  # (H, W, 3) in the order blue, green, red

    def __str__(self) -> str:
        return f"{self.source.path}, frame {self.index}" if self.source.is_video else str(self.source.path)


# Finding and reading


def find_sources(given: Sequence[str], out: Path) -> list[Source]:
    """Return the images and videos given by paths, folders and patterns, each once; folders keep their layout.

    All files are decoded (videos up to the first frame), so that broken ones are reported before the slow work.

    Args:
        given: Paths of files and folders, patterns.
        out: Output folder, which is ignored if it lies inside a given folder.

    Raises:
        DataError: An input is missing, empty, or neither an image nor a video.
    """
    for name in given:
        if not Path(name).exists() and not glob.glob(name, recursive=True):
            folder = Path(name).parent
            siblings = [sibling.name for sibling in folder.iterdir()] if folder.is_dir() else []
            raise DataError(f"{name}: no such file or folder.{nearest(Path(name).name, siblings)}")
    nothing = "no image or video there; give files, folders, or a quoted pattern."
    found = find_files(given, IMAGES | VIDEOS, out, nothing=nothing)
    taken: set[str] = set()
    results = [_unused(_as_written(place), taken) for place in found.values()]
    paths = list(found)
    sources = []
    with ThreadPoolExecutor() as pool, progress("checking", len(paths)) as line:
        try:
            for path, result, (length, fps, size) in zip(paths, results, pool.map(_probe, paths), strict=True):
                sources.append(Source(path, result, length, fps, size))
                line.step()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sources


def _as_written(result: PurePath) -> PurePath:
    suffix = result.suffix.lower()
    if suffix in VIDEOS:
        return result.with_suffix(".mp4")
    return result if suffix in _KEPT_FORMATS else result.with_suffix(".png")


def _unused(result: PurePath, taken: set[str]) -> PurePath:
    """Number a name that another input already has; file systems may ignore case."""
    numbered = (result.with_stem(f"{result.stem}_{number}") for number in itertools.count(2))
    free = next(name for name in itertools.chain([result], numbered) if str(name).lower() not in taken)
    taken.add(str(free).lower())
    return free


def _probe(path: Path) -> tuple[int, float | None, tuple[int, int]]:
    """Return number of frames, frames per second of a video, and size; raise a DataError if it cannot be decoded."""
    if path.suffix.lower() not in VIDEOS:
        return 1, None, check_image(path)
    video = cv2.VideoCapture(str(path))
    try:
        is_read, image = video.read()
        if not is_read:
            raise DataError(f"{path}: cannot be read as a video: it is damaged, empty or in an unknown format.")
        fps = video.get(cv2.CAP_PROP_FPS)
        length = max(1, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
        return length, fps if 0 < fps < 1000 else _FALLBACK_FPS, image.shape[:2]
    finally:
        video.release()


def check_image(path: Path) -> tuple[int, int]:
    """Return height and width of an upright image.

    Raises:
        DataError: It cannot be decoded as in `read_frames`, or is truncated: OpenCV would fill the rest with grey.
    """
    try:
        with Image.open(path) as image:
            image.draft(None, (1, 1))  # an eighth of the size, if the format supports it: only errors matter
            image.load()
    except UnidentifiedImageError:
        raise DataError(f"{path}: is not an image; remove it, or give the images individually.") from None
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be decoded ({reason}); repair or remove it.") from error
    return _read_image(path).shape[:2]


def read_frames(sources: Iterable[Source]) -> Iterator[Frame]:
    """Yield all images and the frames of all videos, turned upright where the file says so."""
    for source in sources:
        images = _read_video(source) if source.is_video else [_read_image(source.path)]
        for index, image in enumerate(images):
            yield Frame(source, index, image)


def _read_image(path: Path) -> np.ndarray:
    try:
        image = mmcv.imfrombytes(path.read_bytes())
    except (OSError, cv2.error) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "err", None) or error
        raise DataError(f"{path}: cannot be decoded ({reason}); repair or remove it.") from error
    if image is None:
        raise DataError(f"{path}: cannot be decoded by OpenCV; convert it to JPEG or PNG.")
    return image


def _read_video(source: Source) -> Iterator[np.ndarray]:
    video = cv2.VideoCapture(str(source.path))
    count = 0
    try:
        while (read := video.read())[0]:
            count += 1
            yield read[1]
    finally:
        video.release()
    if count < source.length:
        _logger.warning("%s: ends after %d of %d frames", source.path, count, source.length)


def in_batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    """Yield lists of `size` frames, the last one shorter."""
    while batch := list(itertools.islice(frames, size)):
        yield batch


class Preparation:
    """A config's test pipeline for decoded images without annotations.

    Args:
        cfg: Config of MMDetection or MMSegmentation; its scope must be the default.
    """

    def __init__(self, cfg: Config) -> None:
        first, *others = pipeline_owner(cfg).pipeline
        loading = {**first, "type": f"{cfg.default_scope}.LoadImageFromNDArray"}
        kept = [step for step in others if not str(step["type"]).endswith("LoadAnnotations")]
        self._steps = Compose([loading, *kept])

    def check(self, sources: Iterable[Source]) -> None:
        """Raise a DataError for a source whose size the pipeline cannot handle, before the slow work."""
        for source in {source.size: source for source in sources}.values():
            self(Frame(source, 0, np.zeros((*source.size, 3), np.uint8)))

    def __call__(self, frame: Frame) -> dict[str, Any]:
        try:
            return self._steps({"img": frame.image, "img_id": frame.index})
        except cv2.error as error:
            height, width = frame.image.shape[:2]
            raise DataError(f"{frame}: {width} x {height} pixels are too narrow for the config's pipeline.") from error
