"""What a figure says in words: a headline that states the finding, and a text for those who cannot see it."""

import textwrap
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from eora_lab.plots.looks import INK
from eora_lab.plots.style import SIZE

LETTER, BOLD = 0.075, 0.083  # inches, the mean of this type
FEW = 6  # points that are read out one by one


def tell(figure: Figure, finding: str, alt: str, below: str = "") -> Figure:
    """Put a headline above a figure, what its series have in common below it, and keep the text that stands for it.

    finding: what the numbers say, in one sentence. alt: what is drawn against what, and the numbers.
    """
    width, style = figure.get_figwidth(), {"x": 0.01, "ha": "left", "color": INK, "fontsize": SIZE}
    figure.suptitle(textwrap.fill(finding, int(width / BOLD)), fontweight="bold", **style)
    text = textwrap.fill(below, int(width / LETTER))
    for legend in figure.legends:
        legend.set_title(text)
        legend.set_alignment("left")
    if below and not figure.legends:
        figure.supxlabel(text, **style)
    figure.set_label(f"{finding}. {alt}")
    return figure


def headline(figure: Figure) -> str:
    """The sentence above a figure."""
    return " ".join(figure.get_suptitle().split())


def alt_text(figure: Figure) -> str:
    """The text that stands for a figure: of `tell`, else its titles and the names of its axes."""
    if said := str(figure.get_label()):
        return said
    titles = [figure.get_suptitle(), *(axes.get_title("left") or axes.get_title() for axes in figure.axes)]
    axes = [f"{one.get_ylabel()} against {one.get_xlabel()}" for one in figure.axes if one.get_xlabel()]
    return " ".join(". ".join(filter(None, (*titles, *axes))).split())


def number(value: float) -> str:
    """A number with the digits that a reader can use."""
    size = abs(value)
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def read_out(x: Sequence, y: Sequence[float], unit: str = "") -> str:
    """The points of a series in words: all of a few, else the first, the last and some between."""
    places = range(len(x)) if len(x) <= FEW else sorted({round(k * (len(x) - 1) / (FEW - 1)) for k in range(FEW)})
    at = [f"{unit}{number(x[i]) if isinstance(x[i], float) else x[i]}" for i in places]
    return ", ".join(f"{number(y[i])} at {place}" for i, place in zip(places, at, strict=True))


def listed(words: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
