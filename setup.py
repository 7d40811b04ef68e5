"""Builds the compiled kernels as `kernels/setup.py` does. Everything else is in pyproject.toml."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("kernels") / "setup.py"), run_name="__main__")
