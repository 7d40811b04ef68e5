"""``python -m vision_kernels``: print every operator's backends, which is active, and why another is not."""

from vision_kernels import backends

print(backends.overview())
