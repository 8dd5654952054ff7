"""Run notebooks at their full size and keep what they show, for the pages of `make site`.

    python -m docs.record            all that are not recorded as they are now
    python -m docs.record 00 02      these

The record of a notebook is `notebooks/recorded/NAME.json.gz`. Runs happen in build/record, where the results of sweeps
stay: what was stopped goes on.
"""

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from docs.notebooks import NOTEBOOKS, RECORDED, ROOT, Record, digest, environment, record_of, workplace
from docs.stills import kept
from eora_lab.environment import versions

WORK = ROOT / "build" / "record"


def record(path: Path, folder: Path = WORK) -> Record:
    """Execute a notebook and keep its outputs. Raises nbclient's CellExecutionError when a cell fails.

    folder: to run in.
    """
    notebook = nbformat.read(path, as_version=4)
    source, place = digest(notebook), workplace(folder)
    resources = {"metadata": {"path": str(place)}}
    begun = time.perf_counter()
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute(env=environment(folder))
    seconds = time.perf_counter() - begun
    state = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return Record(source, round(seconds, 1), versions(), {cell.id: kept(cell.outputs, state) for cell in code})


def out_of_date() -> list[Path]:
    """The notebooks of which nothing is recorded, or what older code showed."""
    known = {path: record_of(path) for path in NOTEBOOKS}
    return [p for p, one in known.items() if one is None or one.digest != digest(nbformat.read(p, as_version=4))]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m docs.record", description=__doc__.partition("\n")[0])
    choices = [path.stem[:2] for path in NOTEBOOKS]
    parser.add_argument("notebooks", nargs="*", metavar="NN", help=f"numbers: {', '.join(choices)}")
    asked = parser.parse_args().notebooks
    if unknown := set(asked) - set(choices):
        parser.error(f"there is no notebook {', '.join(sorted(unknown))}: {', '.join(choices)}")
    for path in [path for path in NOTEBOOKS if path.stem[:2] in asked] if asked else out_of_date():
        print(f"{path.stem} ...", end=" ", flush=True)
        made = record(path)
        made.write(RECORDED / f"{path.stem}.json.gz")
        print(f"{made.seconds / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
