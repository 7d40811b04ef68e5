"""Import all of classification where some packages are missing: python import_classification.py PACKAGE ...

Importing it changes nothing in timm.
"""

import importlib
import sys
from pathlib import Path

sys.modules.update(dict.fromkeys(sys.argv[1:]))  # importing them fails
sys.path[0] = "."
for path in sorted(Path("engine").rglob("*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts))
assert importlib.import_module("mambavision").list_models()
assert ".webp" not in importlib.import_module("timm.data.readers").get_img_extensions(as_set=True)
