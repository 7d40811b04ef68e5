"""The pages of the documentation, and their code blocks."""

import re

from checkout import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    """Return the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def rows(page, heading=""):
    """Return the cells of every table row of a page, or of the section below a heading."""
    text = page.read_text()
    if heading:
        text = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in text.splitlines() if line[:2] == "| "]
