"""A notebook without what a run leaves in it, as it is committed: from stdin to stdout, a filter of git.

    .venv/bin/python docs/strip.py < notebook          what git compares (see docs/lab.py)
    .venv/bin/python docs/strip.py NOTEBOOK ...        write them so

A filter is not enough: a file of another size counts as changed in `git status` and `git pull`, whatever the filter
would say. So JupyterLab tells git of every notebook that it saves (`saved`, named in docs/jupyter).
"""

import json
import subprocess
import sys
from pathlib import Path

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def stripped(text: str) -> str:
    """The same notebook without outputs, counts and what JupyterLab notes of cells and kernels."""
    notebook = json.loads(text)
    own = notebook["metadata"].get("eora_lab")
    notebook["metadata"] = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook["metadata"] |= {} if own is None else {"eora_lab": own}
    for cell in notebook["cells"]:
        cell["metadata"] = {name: value for name, value in cell["metadata"].items() if name == "tags" and value}
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def saved(os_path: str, model: dict, **_: object) -> None:
    """What Jupyter calls after it saved a file: git takes note of a notebook that only ran, and so is not changed."""
    path = Path(os_path)
    if model["type"] != "notebook":
        return
    try:
        git = ["git", "-C", str(path.parent), "-c", f"filter.notebook.clean='{sys.executable}' '{__file__}'"]
        git += ["-c", f"core.attributesFile={Path(__file__).parents[1] / '.gitattributes'}"]
        kept = subprocess.run([*git, "show", f":./{path.name}"], capture_output=True, check=False)
        if kept.returncode == 0 and kept.stdout.decode() == stripped(path.read_text(encoding="utf-8")):
            subprocess.run([*git, "add", "--", path.name], capture_output=True, check=False)
    except (OSError, ValueError, KeyError):  # no git, or no notebook: the file is saved all the same
        return


def main(paths: list[str]) -> None:
    """The command."""
    for path in map(Path, paths):
        path.write_bytes(stripped(path.read_text(encoding="utf-8")).encode())
    if not paths:
        sys.stdout.buffer.write(stripped(sys.stdin.buffer.read().decode()).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
