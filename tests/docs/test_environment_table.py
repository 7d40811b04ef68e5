"""The page on environment variables lists every variable that the sources read, and no other."""

import re
import subprocess

from checkout import ROOT
from pages import rows

PAGE = ROOT / "docs" / "environment-variables.md"
NAME = r"[A-Z][A-Z0-9_]+"
OF_LIBRARIES = "Read by dependencies"
OF_SHELL = {"BASH_SOURCE", "PWD"}


def sources(*patterns):
    """Return the text of tracked files, of the tests only those that users run with options."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [ROOT / name for name in names if not name.startswith("tests/") or name.startswith("tests/long/")]
    return [path.read_text() for path in paths if path.is_file()]


def read_in_code(text):
    """Names quoted in lines that mention the environment, in constants ..._VARIABLE, and in configs."""
    for line in text.splitlines():
        if re.search(r"\b(environ|environment|getenv)\b", line):
            yield from re.findall(rf"[\"']({NAME})[\"'](?!:)", line)  # "NAME": value sets it for another program
    yield from re.findall(rf"^\w+_VARIABLE = \"({NAME})\"", text, re.MULTILINE)
    yield from re.findall(rf"{{{{\$({NAME}):", text)


def read_in_shell(text):
    code = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    return set(re.findall(rf"\$\{{?({NAME})\b", code)) - OF_SHELL


def read_in_makefile(text):
    return set(re.findall(rf"\$\(({NAME})\)", text)) - set(re.findall(rf"^({NAME}) :=", text, re.MULTILINE))


def variables():
    readers = {
        read_in_code: ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh"),
        read_in_shell: ("*.sh",),
        read_in_makefile: ("Makefile",),
    }
    return {name for read, patterns in readers.items() for text in sources(*patterns) for name in read(text)}


def listed(heading=""):
    return {name for cells in rows(PAGE, heading) for name in re.findall(rf"`({NAME})`", cells[0])}


def test_every_variable_is_listed():
    assert {"COCO_ROOT", "CXX", "MASTER_ADDR", "NODES", "TESTS", "VISION_KERNELS_BACKEND"} <= variables()
    assert not variables() - listed()


def test_every_listed_variable_occurs_in_the_sources():
    text = "\n".join(sources("*.py", "*.sh", "Makefile"))
    assert not {name for name in listed() - listed(OF_LIBRARIES) if not re.search(rf"\b{name}\b", text)}
