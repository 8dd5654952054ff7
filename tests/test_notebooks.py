"""The notebooks keep their form, and run from top to bottom."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from docs.notebooks import NOTEBOOKS, environment
from tests.notebooks import smoke_copy, smoke_parameters

CODE_CELLS = 25
LINES = 20  # of a code cell
STATEMENTS = 3  # of a function: enough to format something, too few for an algorithm

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def statements(function: ast.AST) -> int:
    """All in a function's body at any depth, but for its docstring."""
    inner = [node for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function]
    return len(inner) - (ast.get_docstring(function) is not None)


def relative_links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"(?:src|href)=[\"']([^\"']+)[\"']", text)
    return [link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)]


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == sorted({path.name[:2] for path in NOTEBOOKS})  # one a number
    assert NOTEBOOKS


@each
def test_a_notebook_is_stored_without_what_a_run_leaves(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "eora_lab"}
    assert set(notebook.metadata.language_info) == {"name"}
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z][a-z0-9_-]+", cell.id), f"{cell.id}: cell ids are words"
        assert set(cell.metadata) <= {"tags"}, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


@each
def test_a_notebook_opens_and_ends_as_all_do(path):
    notebook = read(path)
    first, last = notebook.cells[0], notebook.cells[-1]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "?" in first.source  # its question
    opening = " ".join(cell.source for cell in notebook.cells[:3] if cell.cell_type == "markdown")
    assert "minute" in opening, "say how long it takes"
    assert re.search(r"(versions|environment)\(\)", code_cells(notebook)[0].source), "say what it ran with"
    assert last.cell_type == "markdown" and "<details>" in last.source, "end with exercises and their hints"


@each
def test_one_cell_holds_the_parameters_and_the_small_ones_are_among_them(path):
    notebook = read(path)
    cell = parameters_cell(notebook)
    tree = ast.parse(cell.source)
    assert all(isinstance(node, ast.Assign) for node in tree.body), "plain assignments only"
    assert "#" in cell.source, "say what to change for another model"
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert smoke_parameters(notebook).keys() <= names


@each
def test_a_notebook_is_thin(path):
    cells = code_cells(read(path))
    assert len(cells) <= CODE_CELLS
    for cell in cells:
        imports = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        folded = sum(node.end_lineno - node.lineno for node in imports)  # a list of names is one line
        assert sum(bool(line.strip()) for line in cell.source.splitlines()) - folded <= LINES, cell.id
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef), f"{cell.id}: classes belong to the package"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert statements(node) <= STATEMENTS, f"{cell.id}: {node.name} belongs to the package"
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"), cell.id


@each
def test_links_of_a_notebook_lead_to_files(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for link in relative_links(cell.source):
                assert (path.parent / link).exists(), f"{cell.id}: {link}"


def test_these_checks_see_what_they_look_for():
    body = "def f(x):\n '''doc'''\n for i in x:\n  y = i\n  z = y\n return z"
    assert statements(ast.parse(body).body[0]) == 4
    assert relative_links("[a](../b.md#c) ![d](e.svg 'f') [g](https://h) <img src='i.png'> [j](#k)") == [
        "../b.md", "e.svg", "i.png",
    ]  # fmt: skip
    broken = {"a": {"state": {"outputs": [{"output_type": "error", "ename": "ValueError", "evalue": "no"}]}}}
    assert swallowed_errors(broken) == ["ValueError: no"]


def swallowed_errors(state: dict) -> list[str]:
    """Errors inside Output widgets, which no cell reports."""
    outputs = [output for widget in state.values() for output in widget["state"].get("outputs", [])]
    return [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]


@pytest.mark.notebooks
@each
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient comes with the extra `lab`")
    pytest.importorskip("papermill", reason="papermill is the extra `lab`")
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    copy = smoke_copy(path, tmp_path)
    notebook = read(copy)
    resources = {"metadata": {"path": str(copy.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    widgets = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    assert swallowed_errors(widgets.get("state", {})) == []
