"""The house: its rooms, imports that go one way through them, no ring of files, and the public places."""

import ast
import graphlib
import importlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import eora_lab

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "eora_lab"
ORDER = ["errors", "files", "environment", "products", "progress", "model", "text", "calibrate", "compress"]
ORDER += ["compensate", "layer", "formats", "run", "measure", "finetune", "experiment", "plots", "board"]
ORDER += ["widgets", "cli"]


def imports(path: Path) -> set[str]:
    """Full names of everything of this package that a file imports, at its top or within."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "eora_lab"}


def module_of(name: str, modules: dict[str, Path]) -> str:
    """The module that holds a name."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def arrows(package: Path) -> dict[str, set[str]]:
    """Module -> modules that it imports."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = path
    return {name: {module_of(one, modules) for one in imports(path)} - {name} for name, path in modules.items()}


def against_the_order(package: Path) -> list[str]:
    """Arrows from a room to one that comes after it."""
    rooms = {room: place for place, room in enumerate(ORDER)}
    found = []
    for module, targets in arrows(package).items():
        if module == "eora_lab":
            continue  # it hands on names of all rooms
        for target in targets:
            here, there = (name.split(".")[1] if "." in name else name for name in (module, target))
            if there not in rooms or rooms[there] > rooms[here]:
                found.append(f"{module} imports {target}")
    return found


def test_the_rooms_are_those_of_the_order():
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert entries - {"__init__"} == set(ORDER)


def test_imports_go_one_way():
    assert against_the_order(PACKAGE) == []


@pytest.mark.parametrize(
    "line", ["from eora_lab.cli import main", "import eora_lab.run.recipe", "from eora_lab.run import recipe"]
)
def test_an_import_against_the_order_is_found(tmp_path, line):
    copy = shutil.copytree(PACKAGE, tmp_path / "eora_lab")
    file = copy / "compress" / "rtn.py"
    file.write_text(file.read_text() + f"\n\ndef late():\n    {line}\n")
    (found,) = against_the_order(copy)
    assert found.startswith("eora_lab.compress.rtn imports eora_lab.")


NAMESPACES = ("eora_lab", *(f"eora_lab.{name}" for name in ("compress", "compensate", "formats", "experiment")))
NAMESPACES += ("eora_lab.plots", "eora_lab.widgets")


def code_of(path: Path) -> Iterator[str]:
    """The Python that a notebook or a text shows."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        yield from ("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code")
    else:
        yield from re.findall(r"```python\n(.*?)```", text, re.S)


def private_imports(code: str) -> list[str]:
    """What code imports of this package from elsewhere than the public places, or what these do not offer."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] == "eora_lab" and a.name != "eora_lab"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "eora_lab":
            offered = importlib.import_module(node.module).__all__ if node.module in NAMESPACES else []
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in offered]
    return found


PAGES = [
    *ROOT.glob("notebooks/*.ipynb"),
    *ROOT.glob("notebooks/solutions/*.ipynb"),
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_notebooks_and_texts_import_from_the_public_places_only(path):
    pytest.importorskip("ipywidgets", reason="ipywidgets is the extra `lab`")
    assert [name for code in code_of(path) for name in private_imports(code)] == []


def test_the_check_of_imports_sees_what_is_private():
    assert private_imports("from eora_lab.run.recipe import Recipe\nimport eora_lab.files") == [
        "eora_lab.run.recipe.Recipe", "eora_lab.files",
    ]  # fmt: skip
    code = "from eora_lab import Recipe, hidden\nfrom eora_lab.compress import rtn"
    assert private_imports(code) == ["eora_lab.hidden"]


def test_every_public_name_is_there_and_typed():
    stub = set(re.findall(r"import (\w+) as \1$", (PACKAGE / "__init__.pyi").read_text(), re.M)) | {"__version__"}
    assert stub == set(eora_lab.__all__) == set(dir(eora_lab))
    for place in NAMESPACES:
        module = importlib.import_module(place)
        assert all(hasattr(module, name) for name in module.__all__), place
    for line in (PACKAGE / "__init__.pyi").read_text().splitlines():
        if line.startswith("from"):
            place, name = re.match(r"from (\S+) import (\w+)", line).groups()
            assert getattr(importlib.import_module(place), name) is getattr(eora_lab, name)
    assert (PACKAGE / "py.typed").exists()


def test_no_files_import_each_other_in_a_ring():
    graphlib.TopologicalSorter(arrows(PACKAGE)).prepare()  # raises CycleError, which names the ring
