"""The shape of the repository: who may import whom, and nothing that does not belong."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import ROOT, SOURCES, tracked

# What the files below a folder may import besides the standard library and their own package. The first match counts.
OPENMMLAB = {"mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain"}
PROGRAMS = {
    "mambavision",
    "vision_kernels",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "PIL",
    "yaml",
    "rich",
    "matplotlib",
}
MAY_IMPORT = {
    "assets/demo": {"mambavision", "mmcv", "numpy", "PIL", "rich", "sklearn", "yaml"},
    "kernels/vision_kernels": {"torch", "triton"},
    "kernels/benchmarks": {"vision_kernels", "mambavision", "torch", "timm", "mamba_ssm"},
    "mambavision/openmmlab": {
        "vision_kernels",
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "sklearn",
        "rich",
        "cv2",
        "PIL",
    }
    | OPENMMLAB,
    "mambavision": {"vision_kernels", "torch", "timm", "numpy", "safetensors", "huggingface_hub", "rich"},
    "classification": PROGRAMS | {"engine", "wandb", "sklearn"},
    "object_detection": PROGRAMS | OPENMMLAB,
    "semantic_segmentation": PROGRAMS | OPENMMLAB,
}
# May be absent, and so must not be imported when a module is.
OPTIONAL = {"triton", "wandb", "sklearn", "matplotlib", "transformers", "natten"} | OPENMMLAB
PROGRAMS_OF_TESTS = Path(__file__).parent / "programs"


def imports(path, top_level_only=False):
    tree = ast.parse((ROOT / path).read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module]
        yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize("path", SOURCES)
def test_dependencies_point_one_way(path):
    folder = next((folder for folder in MAY_IMPORT if path.startswith(folder + "/")), None)
    if folder is None:
        assert path in ("hubconf.py", "setup.py", "kernels/setup.py")
        return
    own = {"vision_kernels" if folder == "kernels/vision_kernels" else folder.split("/")[0]}
    own |= {file.stem for file in (ROOT / path).parent.glob("*.py")}  # programs that lie side by side
    foreign = set(imports(path)) - set(sys.stdlib_module_names) - MAY_IMPORT[folder] - own
    assert not foreign, f"{path} imports {foreign}"


PACKAGES = {"mambavision": "mambavision", "vision_kernels": "kernels/vision_kernels", "engine": "classification/engine"}


def modules():
    """Return the path of every module of our packages by its name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in SOURCES:
            if path.startswith(folder + "/"):
                inside = Path(path).relative_to(folder).with_suffix("").parts
                found[".".join([package, *(part for part in inside if part != "__init__")])] = path
    return found


class _Imports(ast.NodeVisitor):
    """Collects the modules that a module imports, anywhere but for type checkers."""

    def __init__(self, known):
        self.known, self.found = known, set()

    def visit_If(self, node):
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names} & self.known

    def visit_ImportFrom(self, node):
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            self.found |= {inner if inner in self.known else node.module} & self.known


def circle(graph):
    """Return the names along a circle of a directed graph, or None."""
    done = set()

    def follow(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        found = next(filter(None, (follow(each, [*trail, name]) for each in sorted(graph[name]))), None)
        done.add(name)
        return found

    return next(filter(None, (follow(name, []) for name in sorted(graph))), None)


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_modules_import_each_other_in_a_circle():
    """Neither at the top level nor within functions."""
    paths, graph = modules(), {}
    for name, path in paths.items():
        visitor = _Imports(set(paths))
        visitor.visit(ast.parse((ROOT / path).read_text()))
        graph[name] = visitor.found - {name}
    assert len(graph) > 100
    found = circle(graph)
    assert found is None, " -> ".join(found)


@pytest.mark.parametrize("path", [path for path in SOURCES if Path(path).parent == Path("classification")])
def test_programs_call_the_engine_module_of_their_name(path):
    program = Path(path).stem
    called = {
        node.module
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("engine.") and node.module != "engine.options"
    }
    assert called == {f"engine.{program}"}


@pytest.mark.parametrize("path", SOURCES)
def test_optional_packages_are_imported_where_they_are_used(path):
    if Path(path).name.startswith("triton_"):
        return  # kernels are compiled from modules, which are imported when the first of them is called
    if not path.startswith(("mambavision/openmmlab/", "assets/demo/")) and "/tools/" not in path:
        assert not set(imports(path, top_level_only=True)) & OPTIONAL


LIBRARY = [
    path
    for path in SOURCES
    if path.startswith(("kernels/vision_kernels/", "mambavision/"))
    and not path.startswith(("mambavision/openmmlab/", "mambavision/running/"))
    and Path(path).name not in ("__main__.py", "complexity.py")  # programs
]


@pytest.mark.parametrize("path", LIBRARY)
def test_library_names_no_flag_and_no_program(path):
    """Programs add the flags that cure an error."""
    strings = [
        node.value
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    found = [text for text in strings if re.search(r"(^|[\s(\"'`])--[a-z]|\b(train|test|validate|predict)\.py\b", text)]
    assert not found


def test_only_the_openmmlab_tasks_import_the_adapter():
    importers = {
        path.split("/")[0] for path in SOURCES if "mambavision.openmmlab" in (ROOT / path).read_text(encoding="utf-8")
    }
    assert importers <= {"mambavision", "object_detection", "semantic_segmentation"}
    own = [path for path in SOURCES if path.startswith("mambavision/") and "/openmmlab/" not in path]
    assert not [path for path in own if "import mambavision.openmmlab" in (ROOT / path).read_text()]
    assert not [path for path in own if "from mambavision.openmmlab" in (ROOT / path).read_text()]


@pytest.mark.parametrize("path", SOURCES)
def test_search_path_is_left_alone(path):
    assert "sys.path" not in (ROOT / path).read_text()


def test_classification_needs_no_openmmlab():
    command = [sys.executable, str(PROGRAMS_OF_TESTS / "import_classification.py"), *sorted(OPENMMLAB)]
    subprocess.run(command, cwd=ROOT / "classification", check=True)


def test_kernels_folder_is_no_package():
    """Hugging Face publishes a package called `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_test_data_and_pictures_are_small():
    sizes = {name: (ROOT / name).stat().st_size for name in tracked()}
    assert sum(size for name, size in sizes.items() if name.startswith("tests/data/")) < 4e6
    for name, size in sizes.items():
        limit = 300e3 if Path(name).suffix in (".png", ".jpg") else 1.3e6
        assert size < limit, name


def test_torch_hub_offers_every_model(tmp_path):
    """From a checkout that is not installed."""
    command = [sys.executable, str(PROGRAMS_OF_TESTS / "load_from_hub.py"), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # where torch.hub leaves it after loading from its cache
    subprocess.run(command, cwd=tmp_path, check=True, env=environment)
