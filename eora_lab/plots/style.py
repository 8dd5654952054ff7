"""How all figures look: one width, one size of type, and no setting of a user's matplotlibrc."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib.pyplot as plt
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from eora_lab.plots.looks import INK, PAPER, SERIES

WIDTH = 8.0  # inches of every figure, so that letters are of one size on a page
NARROW = 2.0  # inches that a panel has at least; more than four make a wider figure
SIZE = 10  # of all letters, in points
BAND = 0.15  # opacity
STYLE = {
    "font.size": SIZE,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": SIZE,
    "axes.titlelocation": "left",
    "axes.labelsize": SIZE,
    "xtick.labelsize": SIZE,
    "ytick.labelsize": SIZE,
    "figure.titlesize": SIZE,
    "figure.labelsize": SIZE,
    "legend.frameon": False,
    "legend.fontsize": SIZE,
    "legend.title_fontsize": SIZE,
    "axes.prop_cycle": cycler(color=[look.colour for look in SERIES]),
    "figure.figsize": (WIDTH, 3.4),
    "figure.constrained_layout.use": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 6,
    "svg.hashsalt": "eora-lab",  # the same bytes every time
    "svg.fonttype": "path",
    "figure.dpi": 150,
    "savefig.dpi": 150,
}


@contextmanager
def styled() -> Iterator[None]:
    """The style of these figures, whatever a user's matplotlibrc says."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def panels(rows: int, columns: int, height: float, width: float = WIDTH, **options) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows x columns axes, each of the given height in inches. To be called within `styled`.

    A notebook shows the figure that a cell returns, and shows it once.
    """
    size = (max(width, NARROW * columns), rows * height)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    plt.close(figure)
    return figure, axes.tolist()
