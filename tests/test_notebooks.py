"""The notebooks keep their form, and run from top to bottom."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

from docs.lab import FIRST, command, surroundings
from docs.notebooks import NOTEBOOKS, ROOT, SOLUTIONS, environment
from docs.strip import saved as told_git
from docs.strip import stripped
from tests.notebooks import as_clone, smoke_copy, smoke_parameters

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


def test_jupyterlab_opens_at_the_first_notebook_with_our_settings_beside_the_users():
    assert (ROOT / FIRST).is_file()
    assert command([], root=False)[-1].endswith(f"/lab/tree/{FIRST}") and "--allow-root" not in command([], root=False)
    assert "--allow-root" in command(["--no-browser"], root=True)
    assert FIRST not in " ".join(command(["notebooks/02_svd_vs_eora_error_analysis.ipynb"], root=False))
    paths = surroundings({"JUPYTER_CONFIG_PATH": "/theirs", "HOME": "/home/a"})
    assert paths["JUPYTER_CONFIG_PATH"].split(":") == [str(ROOT / "docs" / "jupyter"), "/theirs"]
    assert surroundings({}) == {"JUPYTER_CONFIG_PATH": str(ROOT / "docs" / "jupyter")}


def test_these_checks_see_what_they_look_for():
    body = "def f(x):\n '''doc'''\n for i in x:\n  y = i\n  z = y\n return z"
    assert statements(ast.parse(body).body[0]) == 4
    assert relative_links("[a](../b.md#c) ![d](e.svg 'f') [g](https://h) <img src='i.png'> [j](#k)") == [
        "../b.md", "e.svg", "i.png",
    ]  # fmt: skip
    broken = {"a": {"state": {"outputs": [{"output_type": "error", "ename": "ValueError", "evalue": "no"}]}}}
    assert swallowed_errors(broken) == ["ValueError: no"]
    said = [
        nbformat.v4.new_output("stream", name=name, text=f"x.py:1: UserWarning: {name}")
        for name in ("stderr", "stdout")
    ]
    loud = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=said)])
    assert warned(loud) == ["x.py:1: UserWarning: stderr"]


def swallowed_errors(state: dict) -> list[str]:
    """Errors inside Output widgets, which no cell reports."""
    outputs = [output for widget in state.values() for output in widget["state"].get("outputs", [])]
    return [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]


def test_a_notebook_that_was_run_and_saved_is_the_committed_one_to_git(tmp_path):
    path = NOTEBOOKS[0]
    saved = read(path)
    saved.metadata.kernelspec.display_name = "Python 3 (ipykernel)"
    saved.metadata.language_info.version = "3.12.1"
    saved.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    for number, cell in enumerate(code_cells(saved), 1):
        cell.execution_count, cell.metadata["execution"] = number, {"iopub.execute_input": "now"}
        cell.outputs = [nbformat.v4.new_output("stream", text="π\n")]
    place = tmp_path / "notebooks" / path.name
    place.parent.mkdir()
    shutil.copy(path, place)
    git = as_clone(tmp_path)
    nbformat.write(saved, place)
    told_git(str(place), {"type": "notebook"}, contents_manager=None)
    changed = [*git, "status", "--porcelain", "notebooks"]
    assert subprocess.run(changed, check=True, capture_output=True, text=True).stdout == ""
    code_cells(saved)[0].source += "\nmine = 1"
    nbformat.write(saved, place)
    told_git(str(place), {"type": "notebook"}, contents_manager=None)
    assert path.name in subprocess.run(changed, check=True, capture_output=True, text=True).stdout
    told_git(str(ROOT / "Makefile"), {"type": "file"}, contents_manager=None)  # nothing to do with notebooks
    (tmp_path / "alone").mkdir()
    nbformat.write(saved, tmp_path / "alone" / path.name)  # not in git
    told_git(str(tmp_path / "alone" / path.name), {"type": "notebook"}, contents_manager=None)
    assert "alone" not in subprocess.run([*git, "ls-files"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_git_is_told_to_see_it(path):
    assert stripped(path.read_text(encoding="utf-8")) == path.read_text(
        encoding="utf-8"
    )  # else: docs/strip.py NOTEBOOK


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
    assert warned(notebook) == []


@pytest.mark.notebooks
@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_answer_what_their_notebook_asks(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient comes with the extra `lab`")
    pytest.importorskip("papermill", reason="papermill is the extra `lab`")
    (lesson,) = [one for one in NOTEBOOKS if one.name[:2] == path.name[:2]]
    assert order(read(lesson)) == order(read(path)) and len(order(read(path))) == 3
    for cell in read(path).cells:
        for link in relative_links(cell.source) if cell.cell_type == "markdown" else ():
            assert (path.parent / link).exists(), f"{cell.id}: {link}"
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    notebook = read(smoke_copy(path, tmp_path))
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    said = [
        output["data"]["text/plain"] for cell in code_cells(notebook) for output in cell.outputs if "data" in output
    ]
    assert [one for one in said if one.endswith(": right")] == [f"{one}: right" for one in order(notebook)], said


def order(notebook: nbformat.NotebookNode) -> list[str]:
    """Exercises in the order of their cells."""
    return [call for cell in code_cells(notebook) for call in re.findall(r'check\("([^"]+)"', cell.source)]


def warned(notebook: nbformat.NotebookNode) -> list[str]:
    """What cells say on stderr, where warnings go."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output["text"] for output in outputs if output.get("name") == "stderr" and "Warning" in output["text"]]
