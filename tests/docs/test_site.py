"""The documentation builds without warnings, and its pages load nothing from elsewhere."""

import os
import re
import subprocess
import sys

import pytest

from checkout import ROOT

pytest.importorskip("mkdocstrings")
pytest.importorskip("material")


def test_site_builds_and_stands_alone(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        tags = re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", page.read_text())
        loaded = [tag for tag in tags if 'rel="canonical"' not in tag]
        assert not [tag for tag in loaded if re.search(r"(?:src|href)=\"?(?:https?:)?//", tag)], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet
