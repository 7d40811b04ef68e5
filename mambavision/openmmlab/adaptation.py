"""Every change to the behaviour of OpenMMLab's own modules, in one function."""

import os
import warnings

import cv2
from mmengine.fileio import register_backend, register_handler
from mmengine.fileio.io import backend_instances
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from mambavision.openmmlab import mmcv_ops
from mambavision.openmmlab.checkpoints import AtomicLocalBackend, load_from_local, load_url
from mambavision.openmmlab.json_logs import FiniteJsonHandler


def adapt() -> None:
    """Adapt OpenMMLab's libraries; may be called repeatedly.

    - mmcv's compiled operators are replaced by torchvision's where they are not installed.
    - Local and downloaded checkpoints are read under the rules of `mambavision.checkpoint`.
    - Files are written atomically, and unreadable ones are reported with their path.
    - JSON files have null for numbers that are not finite.
    - Messages of OpenCV and FFmpeg about broken files, which this package reports itself, and warnings of mmengine 0.10
      about pkg_resources are suppressed.
    """
    mmcv_ops.install()
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)
    mmengine_checkpoint.load_url = load_url  # mmengine's own unpickles downloads without restriction
    register_backend("local", AtomicLocalBackend, prefixes="", force=True)
    backend_instances.clear()  # a cache of backends
    register_handler("json")(FiniteJsonHandler)
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
