"""Copies of the notebooks with the small parameters that they name themselves."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from docs.lab import keep_clean
from docs.notebooks import ROOT, workplace


def smoke_parameters(notebook: nbformat.NotebookNode) -> dict:
    """What a notebook runs with in a test: `metadata.eora_lab.smoke`."""
    return dict(notebook.metadata["eora_lab"]["smoke"])


def smoke_copy(path: Path, folder: Path) -> Path:
    """A copy of a notebook with its smoke parameters set, beside the repository's other folders."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    target = workplace(folder) / path.name
    notebook = load_notebook_node(str(path))
    nbformat.write(parameterize_notebook(notebook, smoke_parameters(notebook)), target)
    return target


def as_clone(folder: Path) -> list[str]:
    """Let git look after the notebooks of a folder as `make lab` does in a clone. Returns how a command begins."""
    for name in ("docs/strip.py", ".gitattributes"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    for step in (["init", "-q"], ["add", "notebooks"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *step], check=True)
    keep_clean(folder)
    return git
