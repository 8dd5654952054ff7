"""What bytes buy: perplexity against bits a weight, a labelled point a cell."""

import numpy as np
import pandas
from jaxtyping import Float
from matplotlib.figure import Figure

from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import DENSE
from eora_lab.plots.findings import cell_names
from eora_lab.plots.labels import LINE, End, label_ends
from eora_lab.plots.looks import INK, looks, method_name
from eora_lab.plots.scales import AXES, figures, metric_name, metrics, plain_log_axis
from eora_lab.plots.style import panels, styled
from eora_lab.plots.words import number, tell

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
    names = cell_names(frame)
    with styled():
        height = max(3.4, LINE * (len(named) + 4))
        figure, [[axes]] = panels(1, 1, height)
        axes.plot(bits[best], value[best], color=INK, linewidth=0.8, zorder=1)
        for method, one in look.items():
            here = (frame["method"] == method).to_numpy()
            axes.plot(bits[here], value[here], one.marker, color=one.colour, label=method_name(method))
        axes.margins(x=0.12, y=0.1)
        if lower and value.max() > 3 * value.min():
            plain_log_axis(axes, "y")
        axes.set_xlabel(AXES["bits_per_weight"])
        axes.set_ylabel(metric_name(frame, metric))
        colours = [look[method].colour for method in frame["method"]]
        label_ends(axes, [End(bits[i], value[i], names[i], colours[i]) for i in named], height)
        figure.legend(loc="outside lower left", ncols=5)
    points = "; ".join(f"{names[i]} {number(value[i])} at {bits[i]:.2f} bits" for i in best)
    alt = f"{' '.join(metric_name(frame, metric).split())}, against {AXES['bits_per_weight']}; {len(frame)} cells. "
    ends = [f"{number(value[i])} at {bits[i]:.2f} bits" for i in best]
    span = f"from {ends[0]} to {ends[-1]}" if len(best) > 1 else ends[0]
    what = metric_name(frame, metric).split("\n")[0]
    headline = f"{len(best)} of {len(frame)} cells are unbeaten: {what} {span}"
    alt += f"No other cell is better with fewer bits than: {points}."
    return tell(figure, headline, alt, "on the line: no other cell is better with fewer bits")


def pareto(cost: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"]) -> list[int]:
    """The points that no other one beats in both, by rising cost."""
    found: list[int] = []
    for i in np.lexsort((loss, cost)).tolist():
        if not found or loss[i] < loss[found[-1]]:
            found.append(i)
    return found
