"""The notebooks: which there are, a place to run them in, and what they showed when they were last run whole."""

import gzip
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))  # of exercises
RECORDED = ROOT / "notebooks" / "recorded"


@dataclass(frozen=True)
class Record:
    """What a notebook showed at its full size.

    digest: of the code that made it. outputs: id of a cell -> its outputs, as nbformat has them.
    """

    digest: str
    seconds: float
    versions: dict
    outputs: dict[str, list[dict]]

    def write(self, path: Path) -> None:
        """Keep it, the same bytes for the same record."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(asdict(self), ensure_ascii=False, sort_keys=True).encode()
        path.write_bytes(gzip.compress(content, mtime=0))


def record_of(notebook: Path, folder: Path = RECORDED) -> Record | None:
    """What is recorded of a notebook, if anything is."""
    path = folder / f"{notebook.stem}.json.gz"
    return Record(**json.loads(gzip.decompress(path.read_bytes()))) if path.exists() else None


def digest(notebook: NotebookNode) -> str:
    """Of its code: another text around the same code shows the same."""
    code = [(cell.id, cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def workplace(folder: Path) -> Path:
    """A folder for copies of notebooks, beside the repository's other folders."""
    place = folder / "notebooks"
    place.mkdir(parents=True, exist_ok=True)
    for name in ("data", "kernels"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "figures", folder / "figures", dirs_exist_ok=True)  # JupyterLab shows no file behind a link
    return place


def environment(folder: Path) -> dict[str, str]:
    """For kernels and servers: this package, nobody's Jupyter settings, and figures where kernels put them."""
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    own |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    folders = {name: str(folder / "jupyter" / place) for name, place in own.items()}
    (folder / "jupyter").mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    around = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return {**around, **folders, "PYTHONPATH": path}
