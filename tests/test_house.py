"""The house: its rooms, imports that go one way through them, and no files that import each other in a ring."""

import ast
import graphlib
import shutil
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "eora_lab"
ORDER = ["errors", "files", "environment", "model", "text", "calibrate", "compress", "compensate", "layer", "formats"]
ORDER += ["run", "measure", "finetune", "experiment", "plots", "widgets", "cli"]


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


def test_no_files_import_each_other_in_a_ring():
    graphlib.TopologicalSorter(arrows(PACKAGE)).prepare()  # raises CycleError, which names the ring
