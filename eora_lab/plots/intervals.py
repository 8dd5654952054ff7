"""Differences with their intervals: what is decided, and what is not."""

import textwrap
from collections.abc import Mapping

from matplotlib.figure import Figure

from eora_lab.plots.style import LOOKS, panels, styled
from eora_lab.run.intervals import Interval

DECIDED, OPEN = LOOKS["act_s_released"].colour, "#666666"


def plot_intervals(groups: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Differences as dots on a line for their interval; hollow where zero lies inside, which decides nothing.

    groups: horizontal axis with its unit -> (label of a row -> interval).
    """
    rows = list(dict.fromkeys(label for panel in groups.values() for label in panel))
    with styled():
        figure, [line] = panels(1, len(groups), 2.9 + 2.7 / len(groups), 0.26 * len(rows) + 1.3, sharey=True)
        for (unit, panel), axes in zip(groups.items(), line, strict=True):
            for place, label in enumerate(rows):
                if label not in panel:
                    continue
                interval = panel[label]
                colour = DECIDED if interval.decided else OPEN
                axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=1.5)
                face = colour if interval.decided else "white"
                axes.plot(interval.difference, place, "o", color=colour, markerfacecolor=face)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel(textwrap.fill(unit, 30))
            axes.locator_params("x", nbins=4)
            axes.set_yticks(range(len(rows)), rows)
            axes.set_ylim(len(rows) - 0.4, -0.6)
        confidence = next(interval.confidence for panel in groups.values() for interval in panel.values())
        line[0].set_title(f"{100 * confidence:.0f} % intervals; hollow: undecided", loc="left")
    return figure
