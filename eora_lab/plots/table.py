"""The paper's tables: published figures above, measured ones below, each with its own model and axes."""

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eora_lab.plots.labels import End, label_ends
from eora_lab.plots.looks import looks, method_name
from eora_lab.plots.scales import plain_log_axis
from eora_lab.plots.style import BAND, panels, styled
from eora_lab.plots.words import listed, number, tell

PUBLISHED = "#8a7a4a26"  # background: a tint of white and of dark pages alike
HEIGHT = 2.7  # inches of a panel
PAPER = "SVD is the paper's ZeroQuant-V2; where EoRA is best by less than the intervals, nothing is decided"
PLACE = ["source", "task", "base", "rank", "extra"]  # where methods are rivals


def plot_table(frame: pandas.DataFrame) -> Figure:
    """Rows of `experiment.paper_runs.both_sides`, a panel a task: against the rank, or the base and what varies.

    Published figures are in the upper panels, tinted; measured ones, with one standard error, in the lower. They are of
    different models and share no axis.
    """
    sides = [frame[frame["source"] == source] for source in ("published", "measured")]
    sides = [side for side in sides if len(side)]
    columns = max(side["task"].nunique() for side in sides)
    look = looks(list(dict.fromkeys(frame["method"])))
    ranks = frame.loc[frame["method"] != "none", ["source", "rank"]].drop_duplicates()
    curves = frame["base"].nunique() == 1 and len(ranks) > 2 * len(sides) and not frame["extra"].any()
    with styled():
        figure, grid = panels(len(sides), columns, HEIGHT)
        for side, line in zip(sides, grid, strict=True):
            for axes in line[side["task"].nunique() :]:
                axes.remove()
            for (task, part), axes in zip(side.groupby("task", sort=False), line, strict=False):
                (_against_rank if curves else _against_base)(axes, part, look)
                axes.set_title(task)
                axes.set_ylabel(part["unit"].iloc[0])
                if side["source"].iloc[0] == "published":
                    axes.set_facecolor(PUBLISHED)
                if part["unit"].iloc[0] == "perplexity" and part["value"].max() > 2 * part["value"].min():
                    plain_log_axis(axes, "y")
            if curves:
                label_ends(axes, [_end(method, rows, look) for method, rows in part.groupby("method")], HEIGHT)
            base = f", {side['base'].iloc[0]}" if curves else ""
            first = line[0].get_title("left")
            line[0].set_title(f"{side['source'].iloc[0]}: {side['model'].iloc[0]}{base}\n{first}")
        if not curves:
            handles, labels = grid[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower left", ncols=6)
    return tell(figure, f"EoRA is best {listed(map(_wins, sides))} comparisons", " ".join(map(_read, sides)), PAPER)


def _wins(side: pandas.DataFrame) -> str:
    """In how many places EoRA beats every rival, by the numbers alone."""
    loss = side["value"].where(side["unit"] == "perplexity", -side["value"])
    places = [part for _, part in side.assign(loss=loss).groupby(PLACE) if set(part["method"]) > {"eora"}]
    wins = [part.loc[part["loss"] == part["loss"].min(), "method"].tolist() == ["eora"] for part in places]
    return f"in {sum(wins)} of {len(wins)} {side['source'].iloc[0]}"


def _read(side: pandas.DataFrame) -> str:
    """Every number of one side."""
    parts = []
    for (task, unit), part in side.groupby(["task", "unit"], sort=False):
        said = [
            f"{_place(row, True)} {method_name(row['method'])} {number(row['value'])}" for _, row in part.iterrows()
        ]
        parts.append(f"{task}, {unit}: {', '.join(said)}")
    return f"{side['source'].iloc[0].capitalize()}, {side['model'].iloc[0]}. {'. '.join(parts)}."


def _place(row: pandas.Series, several: bool, between: str = " ") -> str:
    """A base, with the rank of its path if that differs from place to place."""
    rank = f"rank {row['rank']}" if several and row["rank"] else ""
    return between.join(filter(None, (row["base"], rank, row["extra"])))


def _end(method: str, rows: pandas.DataFrame, look: dict) -> End:
    last = rows.loc[rows["rank"].idxmax()]
    return End(last["rank"], last["value"], method_name(method), look[method].colour)


def _against_rank(axes: Axes, part: pandas.DataFrame, look: dict) -> None:
    ranks = sorted(set(part.loc[part["method"] != "none", "rank"]))
    for method, rows in part.groupby("method", sort=False):
        one = look[method]
        style = {"color": one.colour, "linestyle": one.line, "label": method_name(method)}
        if method == "none":
            axes.axhline(rows["value"].iloc[0], **style)
            continue
        rows = rows.sort_values("rank")
        axes.plot(rows["rank"], rows["value"], marker=one.marker, **style)
        if rows["low"].notna().any():
            axes.fill_between(rows["rank"], rows["low"], rows["high"], color=one.colour, alpha=BAND, linewidth=0)
    plain_log_axis(axes, "x", ranks, base=2)
    axes.set_xlabel("rank")


def _against_base(axes: Axes, part: pandas.DataFrame, look: dict) -> None:
    ranks = sorted(set(part.loc[part["method"] != "none", "rank"]))
    several = len(ranks) > 1
    names = part.apply(lambda row: _place(row, several, "\n"), axis=1)
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    methods = list(dict.fromkeys(part["method"]))
    for i, method in enumerate(methods):
        here = (part["method"] == method).to_numpy()
        rows, one = part[here], look[method]
        x = names[here].map(places).to_numpy() + 0.6 / len(methods) * (i - (len(methods) - 1) / 2)
        errors = np.array([rows["value"] - rows["low"], rows["high"] - rows["value"]])  # (2, rows)
        known = errors if np.isfinite(errors).any() else None
        style = {"color": one.colour, "linewidth": 1, "label": method_name(method)}
        axes.errorbar(x, rows["value"], known, fmt=one.marker, **style)
    axes.set_xticks(range(len(places)), [name.replace(" ", "\n", 1) for name in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel(f"base (rank {ranks[0]})" if len(ranks) == 1 else "base")
