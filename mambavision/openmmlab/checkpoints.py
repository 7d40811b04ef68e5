"""Checkpoints of mmengine: read under the rules of `mambavision.checkpoint`, and never half written.

mmengine 0.10 loads none of its own training checkpoints with torch 2.6 or newer, and writes files in place.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.fileio.io import backend_instances
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mambavision.checkpoint import read_checkpoint
from mambavision.files import replacing


def _statistic(owner: Any, name: str) -> Any:
    """What ``getattr`` stands for in a checkpoint: pickled logs name the statistics of a HistoryBuffer by it."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise pickle.UnpicklingError(f"GLOBAL getattr is refused for {name!r}")
    return _STATISTICS[name]


_STATISTICS = {name: getattr(HistoryBuffer, name) for name in ("min", "max", "current", "mean")}

# All that mmengine adds to weights and plain settings: the logged values.
torch.serialization.add_safe_globals([HistoryBuffer, (_statistic, "builtins.getattr")])


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a local file (torch.save or safetensors) onto the CPU, from where the model takes it to its device."""
    return read_checkpoint(filename)


class AtomicLocalBackend(LocalBackend):
    """Local files that are replaced only by complete ones."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        with replacing(filepath) as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        self.put(obj.encode(encoding), filepath)


register_backend("local", AtomicLocalBackend, prefixes="", force=True)
backend_instances.clear()  # mmengine keeps those it has made
