"""JSON files of mmengine, such as its logs, without non-finite numbers, which JSON lacks."""

import json
from typing import Any, TextIO

from mmengine.fileio.handlers import JsonHandler
from mmengine.fileio.handlers.json_handler import set_default

from mambavision.text import as_json


class FiniteJsonHandler(JsonHandler):
    """Handler that writes null where mmengine's own writes ``NaN`` or ``Infinity``."""

    def dump_to_fileobj(self, obj: Any, file: TextIO, **options: Any) -> None:
        file.write(self.dump_to_str(obj, **options))

    def dump_to_str(self, obj: Any, indent: int | None = None, default: Any = set_default, **options: Any) -> str:
        plain = json.loads(json.dumps(obj, default=default, **options))  # converts NumPy numbers
        return as_json(plain, indent)
