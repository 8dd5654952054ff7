"""Draw all committed figures again from recorded numbers, in seconds and the same bytes: `python -m figures.rebuild`.

figures/demo.csv         -> demo                    recorded by `make demo`
data/measured/paper/     -> T2, T2-intervals, ...   `eora-lab paper T2 --scale small --store data/measured/paper`
data/measured/<name>/    -> <name>                  `eora-lab sweep <name> --store data/measured/<name>`
kernels/results/<gpu>.json -> the same name         `python -m kernels.bench`
arithmetic alone         -> kernels/floors

What is not recorded is left out; what is recorded in part too, with a line that says so.
"""

import json
import sys
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from eora_lab.experiment.paper_runs import both_sides, rivalry, table_rows
from eora_lab.experiment.store import ResultStore
from eora_lab.experiment.sweep import expand, named_grids, read_grid, rows
from eora_lab.plots import plot_comparison, plot_intervals, plot_sweep, plot_table, save
from kernels.figure import draw

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "data" / "measured"
TABLES = ("T2", "T10")
MODEL = "smollm2-135m"


def paper_figures() -> dict[str, Figure]:
    """The paper's tables at small scale and their intervals, by file name."""
    found: dict[str, Figure] = {}
    for table in TABLES:
        lines, folder = table_rows(table, MODEL, "small"), MEASURED / "paper"
        cells = expand([cell for line in lines for cell in line.cells.values()])
        if whole(cells, folder, f"paper {table} --scale small"):
            store = ResultStore(folder)
            found[table] = plot_table(both_sides(lines, store))
            found[f"{table}-intervals"] = plot_intervals(rivalry(lines, store))
    return found


def sweep_figures() -> dict[str, Figure]:
    """The named ablations, by file name."""
    cells = {name: expand(read_grid(name)) for name in named_grids()}
    whole_ones = [name for name in cells if whole(cells[name], MEASURED / name, f"sweep {name}")]
    return {name: plot_sweep(rows(cells[name], ResultStore(MEASURED / name))) for name in whole_ones}


def whole(cells: list, folder: Path, command: str) -> bool:
    """Whether all cells are recorded."""
    if not folder.is_dir():
        return False
    found = rows(cells, ResultStore(folder))
    missing = len(cells) - (found["status"].eq("done").sum() if len(found) else 0)
    if missing:
        print(
            f"left out: {missing} of {len(cells)} cells missing; eora-lab {command} --store {folder.relative_to(ROOT)}"
        )
    return not missing


def rebuild(to: Path = ROOT) -> list[Path]:
    """Write all figures below a folder, laid out as the repository is. Returns their paths."""
    figures = paper_figures() | sweep_figures()
    record = ROOT / "figures" / "demo.csv"
    if record.exists():
        figures["demo"] = plot_comparison(pandas.read_csv(record))
    written = [path for name, figure in figures.items() for path in save(figure, to / "figures" / name)]
    for result in sorted((ROOT / "kernels" / "results").glob("*.json")):
        written += save(draw(json.loads(result.read_text())), to / "kernels" / "results" / result.stem)
    return written + save(draw(None), to / "kernels" / "floors")


if __name__ == "__main__":
    print(*(f"wrote {path}" for path in rebuild(*map(Path, sys.argv[1:2]))), sep="\n")
