"""What bytes buy: perplexity against bits a weight, a labelled point a cell."""

import numpy as np
import pandas
from jaxtyping import Float
from matplotlib.figure import Figure

from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import DENSE
from eora_lab.plots.curves import plot_setting, touched, varied
from eora_lab.plots.scales import AXES, figures, metric_name, metrics, plain_log_axis, setting_name
from eora_lab.plots.style import LOOKS, looks, method_name, panels, styled

LINE = 0.21  # inches between labels
LABELLED = 16  # cells that all have room for one; of more, those on the line do


def plot_front(frame: pandas.DataFrame, metric: str = "") -> Figure:
    """A metric (the first of the frame if not given) against all bits that a weight takes, a point a cell.

    frame: of `ResultStore.frame` or `sweep`; failed cells and the dense model are left out. A line joins the cells that
    no other one beats in both. Of many cells, only these have a label.
    Raises EoraLabError when there is no finished cell with that metric.
    """
    frame = frame[(frame["status"] == "done") & (frame["compressor"] != DENSE)]
    metric = metric or next(iter(metrics(frame)), "")
    frame = frame.dropna(subset=metric) if metric in frame else frame[:0]
    if frame.empty:
        raise EoraLabError(f"nothing to draw: no finished cell has {metric or 'a metric'}")
    value = figures(frame, metric)[0]
    bits = frame["bits_per_weight"].to_numpy(dtype=np.float64)
    lower = not metric.startswith("tasks.")
    best = pareto(bits, value if lower else -value)
    named = best if len(frame) > LABELLED else list(range(len(frame)))
    look = looks(list(dict.fromkeys(frame["method"])))
    with styled():
        height = max(3.2, LINE * (len(named) + 3))
        figure, [[axes]] = panels(1, 1, 7.4, height)
        axes.plot(bits[best], value[best], color=LOOKS["none"].colour, linewidth=1, zorder=1)
        for method, one in look.items():
            here = (frame["method"] == method).to_numpy()
            axes.plot(bits[here], value[here], one.marker, color=one.colour, label=method_name(method))
        axes.margins(x=0.12, y=0.1)
        if lower and value.max() > 3 * value.min():
            plain_log_axis(axes, "y")
        axes.set_xlabel(AXES["bits_per_weight"])
        axes.set_ylabel(metric_name(frame, metric))
        axes.set_title("on the line: no other cell is better with fewer bits")
        low, high = axes.get_ylim()
        scale = np.log if axes.get_yscale() == "log" else np.asarray
        at = (scale(value) - scale(low)) / (scale(high) - scale(low))  # (cells,) share of the axis
        labels = _labels(frame)
        for cell, place in zip(named, spread(at[named], LINE / height), strict=True):
            line = {
                "arrowstyle": "-",
                "color": "#BBBBBB",
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            }
            axes.annotate(
                labels[cell],
                (bits[cell], value[cell]),
                (1.03, place),
                textcoords="axes fraction",
                va="center",
                fontsize=8,
                arrowprops=line,
            )
        axes.set_ylim(low, high)
        figure.legend(loc="outside upper left", ncols=5)
    return figure


def pareto(cost: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"]) -> list[int]:
    """The points that no other one beats in both, by rising cost."""
    found: list[int] = []
    for i in np.lexsort((loss, cost)).tolist():
        if not found or loss[i] < loss[found[-1]]:
            found.append(i)
    return found


def spread(places: Float[np.ndarray, " n"], gap: float) -> Float[np.ndarray, " n"]:
    """Places of labels near the given ones, in the same order, none closer than `gap` to the next."""
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    moved = places[order] - steps  # rising where labels have room
    up, down = np.maximum.accumulate(moved), np.minimum.accumulate(moved[::-1])[::-1]
    result = np.empty_like(places)
    result[order] = (up + down) / 2 + steps
    return result


def _labels(frame: pandas.DataFrame) -> list[str]:
    """What tells each cell from the others."""
    named = [name for name in varied(frame) if name != "method"]
    parts = {name: touched(frame, name).to_numpy() for name in named}
    methods = [method_name(method) for method in frame["method"]]
    return [
        ", ".join([methods[i], *(setting_name(name, frame[name].iloc[i]) for name in named if parts[name][i])])
        for i in range(len(frame))
    ]


def plot_sweep(frame: pandas.DataFrame) -> Figure:
    """A grid's results: `plot_setting` where one or two settings vary besides the method, else `plot_front`.

    Of two settings the one with more values is the axis, the other one a panel or a line a value.
    """
    done = frame[frame["status"] == "done"]
    others = [name for name in varied(done) if name != "method"] if len(done) else []
    if len(others) > 2 or not others:
        return plot_front(frame)
    return plot_setting(
        frame, max(others, key=lambda name: (done.loc[touched(done, name), name].nunique(), name != "bits"))
    )
