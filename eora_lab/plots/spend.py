"""Bits or rank: on every base the ladder of its bits, and what paths beside each rung buy for the bytes to the next."""

from typing import NamedTuple

import pandas
from matplotlib.figure import Figure

from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import DENSE
from eora_lab.plots.front import pareto
from eora_lab.plots.looks import LOOKS, looks, method_name
from eora_lab.plots.scales import AXES, figures, metric_name, metrics, plain_log_axis
from eora_lab.plots.style import panels, styled
from eora_lab.plots.words import number, tell

HEIGHT = 3.0  # inches of a panel
COLUMNS = 2
BASE = ["compressor", "sparsity", "grid", "bits"]


class Step(NamedTuple):
    """From a base to the next one of its ladder: the least that its bits leave, and that a path in their bytes does."""

    ladder: str
    base: str
    bits: float
    rank: float


def plot_spend(frame: pandas.DataFrame, metric: str = "") -> Figure:
    """A metric (the first of the frame if not given) against all bits that a weight takes, a panel a ladder of bases.

    frame: of `ResultStore.frame` or `sweep`; failed cells and the dense model are left out. A line leads through bases
    alone; from each of them another one through the paths beside it that no other of these beats in both.
    Raises EoraLabError when there is no finished cell with that metric.
    """
    metric = metric or next(iter(metrics(frame)), "")
    cells = _cells(frame, metric)
    if cells.empty:
        raise EoraLabError(f"nothing to draw: no finished cell has {metric or 'a metric'}")
    ladders = list(dict.fromkeys(cells["ladder"]))
    rows = -(-len(ladders) // COLUMNS)
    with styled():
        figure, grid = panels(rows, min(COLUMNS, len(ladders)), HEIGHT, sharey="all")
        places = [axes for line in grid for axes in line]
        for axes in places[len(ladders) :]:
            axes.remove()
        for ladder, axes in zip(ladders, places, strict=False):
            own = cells[cells["ladder"] == ladder]
            bare = own[own["method"] == "none"].sort_values("x")
            alone = LOOKS["none"]
            axes.plot(
                bare["x"], bare["y"], alone.marker, color=alone.colour, linestyle=alone.line, label=method_name("none")
            )
            for base, look in looks(list(dict.fromkeys(own.loc[own["method"] != "none", "base"]))).items():
                here = own[own["base"] == base].reset_index(drop=True)
                line = here.iloc[pareto(here["x"].to_numpy(), here["y"].to_numpy())]
                named, style = f"paths on {base}", look.line
                axes.plot(line["x"], line["y"], look.marker, color=look.colour, linestyle=style, label=named)
            axes.set_title(ladder)
            axes.set_xlabel(AXES["bits_per_weight"])
            axes.set_ylabel(metric_name(frame, metric) if axes in [line[0] for line in grid] else "")
            axes.legend(loc="upper right")
        plain_log_axis(places[0], "y")
    found = steps(frame, metric)
    said = "; ".join(f"{one.base}: next bits {number(one.bits)}, rank {number(one.rank)}" for one in found)
    what = " ".join(metric_name(frame, metric).split())
    alt = f"{what}, against {AXES['bits_per_weight']}; {len(cells)} cells. For the bytes to the next base: {said}."
    return tell(
        figure, answer(found, len(cells)), alt, "a line from a base: paths that no other one beside it beats in both"
    )


def answer(found: list[Step], cells: int) -> str:
    """Whether bytes are better spent on bits or on rank, in one sentence."""
    if not found:
        return f"Of {cells} cells, none is a base with both a next one and a path in its bytes"
    rank = [one.base for one in found if one.rank < one.bits]
    bits = [one.base for one in found if one.rank >= one.bits]
    if not rank or not bits:
        return f"The next megabyte belongs to {'bits' if bits else 'rank'}, on all {len(found)} bases"
    return f"The next megabyte belongs to rank on {', '.join(rank)}, and to bits on {', '.join(bits)}"


def steps(frame: pandas.DataFrame, metric: str) -> list[Step]:
    """Of every base with a next one, and with a path that takes no more than that."""
    found, cells = [], _cells(frame, metric)
    for ladder, own in cells.groupby("ladder", sort=False):
        rungs = own[own["method"] == "none"].sort_values("x")
        for (_, rung), (_, following) in zip(rungs.iloc[:-1].iterrows(), rungs.iloc[1:].iterrows(), strict=True):
            paths = own[(own["base"] == rung["base"]) & (own["method"] != "none") & (own["x"] <= following["x"])]
            if len(paths):
                found.append(Step(str(ladder), rung["base"], float(following["y"]), float(paths["y"].min())))
    return found


def _cells(frame: pandas.DataFrame, metric: str) -> pandas.DataFrame:
    """Finished cells of a metric where less is better, with the ladder and the base that each belongs to, x and y."""
    done = frame[(frame["status"] == "done") & (frame["compressor"] != DENSE)]
    done = done.dropna(subset=metric) if metric in done else done[:0]
    if done.empty:
        return done
    bases = [_base(one, sparsity, grid, int(bits)) for one, sparsity, grid, bits in done[BASE].itertuples(index=False)]
    ladders, names = [one for one, _ in bases], [one for _, one in bases]
    value = figures(done, metric)[0] * (-1 if metric.startswith("tasks.") else 1)
    return done.assign(ladder=ladders, base=names, x=done["bits_per_weight"].astype(float), y=value)


def _base(compressor: str, sparsity: str, grid: str, bits: int) -> tuple[str, str]:
    """(ladder, name) of a base."""
    first = " ".join(filter(None, (compressor, sparsity)))
    if grid == "integer":
        return first, f"{first} {bits}-bit"
    return f"{first}, {'GGUF' if grid.startswith('q') else 'floating-point'} grids", f"{first} {grid}"
