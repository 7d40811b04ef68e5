"""Load a model with torch.hub from a checkout that is not installed: python load_from_hub.py ROOT"""

import importlib
import sys

import torch

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
model = torch.hub.load(sys.argv[1], "mamba_vision_T", source="local", num_classes=3)
assert model.head.out_features == 3
assert "vision_kernels" in sys.modules
hubconf = importlib.import_module("hubconf")
assert all(callable(getattr(hubconf, name)) for name in importlib.import_module("mambavision").list_models())
