"""torch.hub entry points, one for each registered model: ``torch.hub.load("OWNER/REPOSITORY", "mamba_vision_T")``."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

dependencies = ["torch", "timm", "safetensors", "huggingface_hub"]


def _load_vision_kernels_beside() -> None:
    """Import vision_kernels from this checkout, unless it is installed: it does not lie at the top, where hub looks."""
    if importlib.util.find_spec("vision_kernels") is None:
        folder = Path(__file__).parent / "kernels" / "vision_kernels"
        spec = importlib.util.spec_from_file_location("vision_kernels", folder / "__init__.py")
        sys.modules["vision_kernels"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


_load_vision_kernels_beside()

from mambavision import create_model, list_models  # noqa: E402

globals().update({name: partial(create_model, name) for name in list_models()})
