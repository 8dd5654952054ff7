"""How all figures look, and how they are written: the same bytes every time, readable without colour."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from eora_lab.compensate import SOLVERS
from eora_lab.files import write_atomically


class Look(NamedTuple):
    """How a series is drawn: any one of colour, marker and line tells it from the others."""

    colour: str
    marker: str
    line: str | tuple
    name: str = ""  # of a method


# of methods, and of other series in this order. Okabe and Ito's palette, told apart by all colour-blind readers
LOOKS = {
    "eora": Look("#009E73", "D", "-", "EoRA"),
    "svd": Look("#E69F00", "s", "--", "SVD"),
    "act_s": Look("#56B4E9", "^", "-.", "Act-S"),
    "qera_approx": Look("#CC79A7", "X", (0, (3, 1)), "QERA-approx"),
    "lqer": Look("#D55E00", "P", (0, (5, 1, 1, 1, 1, 1)), "LQER"),
    "act_s_released": Look("#0072B2", "v", (0, (1, 2)), "Act-S (released)"),
    "none": Look("#999999", "o", ":", "no compensation"),
    "qera_exact": Look("#000000", "*", (0, (8, 2)), "QERA-exact"),
    "eora_fisher": Look("#AA4499", "d", (0, (6, 2)), "EoRA, two-sided"),
    "eora_paper": Look("#7F5F00", "p", (0, (8, 2, 2, 2)), "EoRA (as printed)"),
}
# of methods that have none, such as those of plugins
OTHERS = (
    Look("#882255", "<", (0, (1, 1, 5, 1))),
    Look("#44AA99", ">", (0, (4, 1, 1, 1))),
    Look("#999933", "h", (0, (6, 1, 2, 1))),
    Look("#332288", "8", (0, (2, 1))),
)
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.prop_cycle": cycler(color=[look.colour for look in LOOKS.values()]),
    "lines.linewidth": 1.5,
    "lines.markersize": 6,
    "svg.hashsalt": "eora-lab",  # the same bytes every time
    "svg.fonttype": "path",
    "figure.dpi": 150,
    "savefig.dpi": 150,
}
BAND = 0.15  # opacity


def method_name(method: str) -> str:
    """What a method is called in a figure: its own name where it has no other."""
    return LOOKS[method].name if method in LOOKS else method


def looks(series: list[Any]) -> dict[Any, Look]:
    """A look for every series: that of its name where it is a method, else the next one that is free.

    Methods without a look of their own get one that no other method has.
    """
    own = [one for one in series if one in SOLVERS and one not in LOOKS]
    free = [look for name, look in LOOKS.items() if name not in series] + [*OTHERS[len(own) :]]
    found = {one: LOOKS[one] if one in LOOKS else free[i % len(free)] for i, one in enumerate(series) if one not in own}
    return {one: found[one] if one in found else OTHERS[own.index(one) % len(OTHERS)] for one in series}


def use_style() -> None:
    """Let every figure that is drawn from now on look like those of the package: for notebooks."""
    plt.style.use(STYLE)


@contextmanager
def styled() -> Iterator[None]:
    """The style of these figures, whatever a user's matplotlibrc says."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def panels(rows: int, columns: int, width: float, height: float, **options) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows x columns axes, each of the given size in inches. To be called within `styled`.

    A notebook shows the figure that a cell returns, and shows it once.
    """
    size = (columns * width, rows * height)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    plt.close(figure)
    return figure, axes.tolist()


def save(figure: Figure, path: Path | str) -> list[Path]:
    """Write a figure as .png and .svg, without dates. Returns both paths. Raises EoraLabError when it cannot."""
    written = []
    with styled():
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            target = Path(path).with_suffix(suffix)
            write_atomically(target, partial(figure.savefig, format=suffix[1:], metadata=metadata))
            written.append(target)
    return written
