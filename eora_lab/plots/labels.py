"""Names at the ends of lines, in place of a legend."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

LINE = 0.21  # inches between labels
AXIS = 0.8  # inches that ticks, their labels and the name of an axis take


class End(NamedTuple):
    """Where a line or a point is, and what it is called."""

    x: float
    y: float
    name: str
    colour: str


def label_ends(axes: Axes, ends: Sequence[End], height: float) -> None:
    """Write names on the right of a panel of the given height in inches, each tied to its end by a thin line.

    To be called when the limits and the scales of the axes are final.
    """
    low, high = axes.get_ylim()
    scale = np.log if axes.get_yscale() == "log" else np.asarray
    at = (scale([end.y for end in ends]) - scale(low)) / (scale(high) - scale(low))  # shares of the axis
    for end, place in zip(ends, spread(at, LINE / (height - AXIS)), strict=True):
        tie = {"arrowstyle": "-", "color": end.colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
        places: dict[str, Any] = {"xycoords": "data", "textcoords": "axes fraction", "va": "center"}
        axes.annotate(end.name, (end.x, end.y), (1.04, place), arrowprops=tie, **places)
    axes.set_ylim(low, high)


def spread(places: Float[np.ndarray, " n"], gap: float) -> Float[np.ndarray, " n"]:
    """Places of labels near the given ones, in the same order, none closer than `gap` to the next."""
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    moved = places[order] - steps  # rising where labels have room
    up, down = np.maximum.accumulate(moved), np.minimum.accumulate(moved[::-1])[::-1]
    result = np.empty_like(places)
    result[order] = (up + down) / 2 + steps
    return result
