"""Print the overview of backends as on a machine without Triton."""

import importlib.util
import sys

sys.modules["triton"] = None  # importing it fails
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *others: None if name == "triton" else find_spec(name, *others)

from vision_kernels.backends import overview  # noqa: E402 - after Triton is hidden

print(overview())
