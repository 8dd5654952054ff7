"""The paper's tables: published figures above, measured ones below, each with its own model and axes."""

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eora_lab.plots.scales import plain_log_axis
from eora_lab.plots.style import BAND, looks, method_name, panels, styled

PUBLISHED = "#F4F1EA"  # background


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
        figure, grid = panels(len(sides), columns, 3.1, 2.9)
        for side, line in zip(sides, grid, strict=True):
            for axes in line[side["task"].nunique() :]:
                axes.remove()
            for (task, part), axes in zip(side.groupby("task", sort=False), line, strict=False):
                (_against_rank if curves else _against_base)(axes, part, look)
                axes.set_ylabel(f"{task} ({part['unit'].iloc[0]})")
                if side["source"].iloc[0] == "published":
                    axes.set_facecolor(PUBLISHED)
                if part["unit"].iloc[0] == "perplexity" and part["value"].max() > 3 * part["value"].min():
                    plain_log_axis(axes, "y")
            base = f", {side['base'].iloc[0]}" if curves else ""
            line[0].set_title(f"{side['source'].iloc[0]}: {side['model'].iloc[0]}{base}")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def _against_rank(axes: Axes, part: pandas.DataFrame, look: dict) -> None:
    ranks = sorted(set(part.loc[part["method"] != "none", "rank"]))
    for method, rows in part.groupby("method", sort=False):
        one = look[method]
        if method == "none":
            axes.axhline(rows["value"].iloc[0], color=one.colour, linestyle=one.line, label=paper_name(method))
            continue
        rows = rows.sort_values("rank")
        axes.plot(
            rows["rank"],
            rows["value"],
            color=one.colour,
            marker=one.marker,
            linestyle=one.line,
            label=paper_name(method),
        )
        if rows["low"].notna().any():
            axes.fill_between(rows["rank"], rows["low"], rows["high"], color=one.colour, alpha=BAND, linewidth=0)
    plain_log_axis(axes, "x", ranks, base=2)
    axes.set_xlabel("rank")


def _against_base(axes: Axes, part: pandas.DataFrame, look: dict) -> None:
    ranks = sorted(set(part.loc[part["method"] != "none", "rank"]))
    several = len(ranks) > 1

    def place_name(row) -> str:
        rank = f"rank {row['rank']}" if several and row["rank"] else ""
        return "\n".join(filter(None, (row["base"], rank, row["extra"])))

    names = part.apply(place_name, axis=1)
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    methods = list(dict.fromkeys(part["method"]))
    for i, method in enumerate(methods):
        here = (part["method"] == method).to_numpy()
        rows, one = part[here], look[method]
        x = names[here].map(places).to_numpy() + 0.6 / len(methods) * (i - (len(methods) - 1) / 2)
        errors = np.array([rows["value"] - rows["low"], rows["high"] - rows["value"]])  # (2, rows)
        known = errors if np.isfinite(errors).any() else None
        axes.errorbar(
            x,
            rows["value"],
            known,
            fmt=one.marker,
            color=one.colour,
            linewidth=1,
            label=paper_name(method),
        )
    axes.set_xticks(range(len(places)), places, fontsize=8 if len(places) > 3 else 9)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel(f"base (paths of rank {ranks[0]})" if len(ranks) == 1 else "base")


def paper_name(method: str) -> str:
    """What the paper calls a method."""
    return "SVD (ZeroQuant-V2)" if method == "svd" else method_name(method)
