"""Pictures and videos that the prediction programs write."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mambavision.errors import OutputError, UserError
from mambavision.files import replacing
from mambavision.openmmlab.prediction.sources import Frame, Source


class Pictures:
    """Writes pictures and videos, which appear in their folder once all of them are complete.

    Args:
        folder: Output folder.
        sources: The inputs; none of these files is overwritten.

    Raises:
        UserError: A picture would replace a source.
    """

    def __init__(self, folder: Path, sources: Sequence[Source]) -> None:
        self._folder = folder
        given = {source.path.resolve() for source in sources}
        for source in sources:
            if (folder / source.result).resolve() in given:
                raise UserError(f"--out {folder}: would overwrite the input {source.result}; choose another folder.")

    def __enter__(self) -> "Pictures":
        self._folder_is_new = not self._folder.exists()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=self._folder))
        except OSError as error:
            raise OutputError(f"{self._folder}: cannot be written ({error.strerror}); choose another place.") from error
        self._video: tuple[Source, cv2.VideoWriter] | None = None
        self._frames = 0
        return self

    def add(self, frame: Frame, picture: np.ndarray) -> None:
        """Write the picture of `frame`, (H, W, 3) in BGR order; the frames of a video in sequence."""
        path = self._unfinished / frame.source.result
        fps = frame.source.fps
        if fps is None:
            with replacing(path) as file:
                file.write(cv2.imencode(path.suffix, picture)[1].tobytes())
            return
        if self._video is None or self._video[0] is not frame.source:
            self.finish()
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = picture.shape[:2]
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
            self._video = frame.source, writer
            self._frames = 0
        self._video[1].write(picture)
        self._frames += 1

    def finish(self) -> None:
        """Complete the last video; after this, only moving the files can fail.

        OpenCV does not report write errors, so the number of frames in the file is checked.
        """
        if self._video is None:
            return
        source, writer = self._video
        writer.release()
        self._video = None
        written = cv2.VideoCapture(str(self._unfinished / source.result)).get(cv2.CAP_PROP_FRAME_COUNT)
        if int(written) != self._frames:
            raise OutputError(
                f"{self._folder / source.result}: the video cannot be written: the disk is full, or this OpenCV has no "
                "MPEG-4 encoder; free some space, or leave out pictures (--no-pictures)."
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_complete = False
        try:
            if kind is None:
                self.finish()
                self._move()
                is_complete = True
        finally:
            if self._video is not None:
                self._video[1].release()
            shutil.rmtree(self._unfinished, ignore_errors=True)
            if self._folder_is_new and not is_complete:
                with contextlib.suppress(OSError):
                    self._folder.rmdir()

    def _move(self) -> None:
        for path in sorted(path for path in self._unfinished.rglob("*") if path.is_file()):
            target = self._folder / path.relative_to(self._unfinished)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            except OSError as error:
                raise OutputError(f"{target}: cannot be written ({error.strerror}); choose another place.") from error
