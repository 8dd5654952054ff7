"""Copies of the notebooks with the small parameters that they name themselves."""

from pathlib import Path

import nbformat

from docs.notebooks import workplace


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
