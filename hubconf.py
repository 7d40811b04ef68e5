"""torch.hub entry points, one for each registered model.

``torch.hub.load("/path/to/clone", "mamba_vision_T", source="local")``
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

dependencies = ["torch", "timm", "safetensors", "huggingface_hub"]


def _import_vision_kernels() -> None:
    """Import vision_kernels from this checkout; it is not at the top level, where torch.hub would find it."""
    folder = Path(__file__).parent / "kernels" / "vision_kernels"
    spec = importlib.util.spec_from_file_location("vision_kernels", folder / "__init__.py")
    sys.modules["vision_kernels"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if "vision_kernels" not in sys.modules:
    _import_vision_kernels()

from mambavision import create_model, list_models  # noqa: E402

globals().update({name: partial(create_model, name) for name in list_models()})
