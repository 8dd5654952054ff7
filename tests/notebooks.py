"""The notebooks: which there are, and copies of them with the small parameters that they name themselves."""

import os
import shutil
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def smoke_parameters(notebook: nbformat.NotebookNode) -> dict:
    """What a notebook runs with in a test: `metadata.eora_lab.smoke`."""
    return dict(notebook.metadata["eora_lab"]["smoke"])


def smoke_copy(path: Path, folder: Path) -> Path:
    """A copy of a notebook with its smoke parameters set, beside the repository's other folders."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    target = folder / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    for name in ("data", "kernels"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "figures", folder / "figures", dirs_exist_ok=True)  # JupyterLab shows no file behind a link
    notebook = load_notebook_node(str(path))
    nbformat.write(parameterize_notebook(notebook, smoke_parameters(notebook)), target)
    return target


def environment(folder: Path) -> dict[str, str]:
    """For kernels and servers: this checkout's package, and nobody's Jupyter settings."""
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    own |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    folders = {name: str(folder / "jupyter" / place) for name, place in own.items()}
    (folder / "jupyter").mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, **folders, "PYTHONPATH": path}


def find_chromium() -> str | None:
    """The browser of the system."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)
