"""Checkpoints of mmengine: read under the rules of `mambavision.checkpoint`, and never half written.

mmengine 0.10 loads none of its own training checkpoints with torch 2.6 or newer, and writes files in place.
"""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.fileio import LocalBackend
from mmengine.logging import HistoryBuffer

from mambavision.checkpoint import read_checkpoint
from mambavision.errors import DataError
from mambavision.files import replacing
from mambavision.openmmlab.metadata import check_metadata


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a local file (torch.save or safetensors) onto the CPU."""
    checkpoint = read_checkpoint(filename)
    check_metadata(checkpoint, filename)
    hub = checkpoint.get("message_hub")
    if isinstance(hub, dict) and isinstance(hub.get("log_scalars"), dict):
        logs = {name: _history(values) for name, values in hub["log_scalars"].items()}
        checkpoint["message_hub"] = {**hub, "log_scalars": logs}
    return checkpoint


def _history(values: Any) -> Any:
    """Rebuild a HistoryBuffer from the values that `mambavision.unpickling` has read."""
    if not isinstance(values, dict) or values.keys() != {"log_history", "count_history", "max_length"}:
        return values  # mmengine logs that it does not resume it
    return HistoryBuffer(values["log_history"].numpy(), values["count_history"].numpy(), values["max_length"])


def load_url(url: str, model_dir: str | None = None, map_location: Any = None, **options: Any) -> dict[str, Any]:
    """Download a checkpoint into the cache of torch.hub, once, and read it like a local file."""
    folder = Path(model_dir or Path(torch.hub.get_dir(), "checkpoints"))
    path = folder / Path(urlparse(url).path).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    return load_from_local(str(path))


class UnreadableFileError(DataError, OSError):
    """An image, mask or annotation file cannot be read, for example because it was deleted during training."""


class AtomicLocalBackend(LocalBackend):
    """Local files that are written atomically; a missing file is an error of the data."""

    def get(self, filepath: str | Path) -> bytes:
        """Return the content of a file.

        Raises:
            UnreadableFileError: The file is missing, or a pipe or device, from which reading could block forever.
        """
        try:
            if os.path.exists(filepath) and not os.path.isfile(filepath):
                raise UnreadableFileError(f"{filepath}: is not a file (but a folder, a pipe or a device); remove it.")
            return super().get(filepath)
        except OSError as error:
            if isinstance(error, UnreadableFileError):
                raise
            reason = error.strerror or error
            raise UnreadableFileError(f"{filepath}: cannot be read ({reason}); restore or remove it.") from error

    def put(self, obj: bytes, filepath: str | Path) -> None:
        with replacing(filepath) as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        self.put(obj.encode(encoding), filepath)
