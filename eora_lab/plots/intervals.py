"""Differences with their intervals: what is decided, and what is not."""

import re
import textwrap
from collections.abc import Mapping
from itertools import starmap

from matplotlib.figure import Figure

from eora_lab.plots.looks import INK, SERIES
from eora_lab.plots.style import panels, styled
from eora_lab.plots.words import tell
from eora_lab.run.intervals import Interval

COLOUR = SERIES[0].colour


def plot_intervals(groups: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Differences as dots on a line for their interval; hollow where zero lies inside, which decides nothing.

    groups: horizontal axis with its unit -> (label of a row -> interval).
    """
    rows = list(dict.fromkeys(label for panel in groups.values() for label in panel))
    with styled():
        figure, [line] = panels(1, len(groups), 0.26 * len(rows) + 1.7, sharey=True)
        for (unit, panel), axes in zip(groups.items(), line, strict=True):
            for place, label in enumerate(rows):
                if label not in panel:
                    continue
                interval = panel[label]
                axes.plot([interval.low, interval.high], [place, place], color=COLOUR, linewidth=1.5)
                face = COLOUR if interval.decided else "none"
                axes.plot(interval.difference, place, "o", color=COLOUR, markerfacecolor=face)
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.set_xlabel(textwrap.fill(unit, 30))
            axes.locator_params("x", nbins=4)
            axes.set_yticks(range(len(rows)), rows)
            axes.set_ylim(len(rows) - 0.4, -0.6)
    confidence = next(interval.confidence for panel in groups.values() for interval in panel.values())
    headline = "; ".join(starmap(_decided, groups.items()))
    said = [f"{unit}: " + "; ".join(f"{label}, {_read(one)}" for label, one in p.items()) for unit, p in groups.items()]
    below = f"{100 * confidence:.0f} % intervals; hollow: zero lies inside, undecided"
    return tell(figure, headline, f"{below}. {'. '.join(said)}.", below)


def _decided(unit: str, panel: Mapping[str, Interval]) -> str:
    """How many differences lie on which side of zero, for sure. The unit may say what a side means."""
    signs = [(one.difference > 0) - (one.difference < 0) for one in panel.values() if one.decided]
    what, good = re.split(r"[,(]| mean score", unit)[0].strip(), re.search(r"\((below|above) 0: (.*)\)", unit)
    sides = {"below": signs.count(-1), "above": signs.count(1)}
    if good:
        side, words = good.groups()
        other = len(signs) - sides[side]
        return f"{words} in {sides[side]} of {len(panel)} and worse in {other} ({what})"
    return f"{sides['below']} of {len(panel)} are below 0 and {sides['above']} above ({what})"


def _read(one: Interval) -> str:
    return f"{one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}]{'' if one.decided else ', undecided'}"
