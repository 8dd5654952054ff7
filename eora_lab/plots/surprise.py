"""A text as models read it: every token coloured by how much it surprises them, as HTML for notebooks and pages.

Colours are laid over the page thinly, so that its own letters stay readable on white and on dark. A line under a token
grows with its surprise, too, so that the text can be read without colours.
"""

import html
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from matplotlib.colors import to_rgb

from eora_lab.plots.inside import look_of
from eora_lab.plots.looks import INK, SERIES
from eora_lab.plots.words import listed, number

STEPS = (1, 2, 4, 8)  # nats, where the next colour begins
OPACITY = (0, 0.18, 0.36, 0.54, 0.72)  # of the colour behind a token
LINES = (0, 1, 2, 4, 6)  # pixels below it
COLOUR = SERIES[1].colour
LAYOUT = (
    ".eora-surprise .texts {display: flex; flex-wrap: wrap; gap: 0 1em; margin-top: .6em}"
    ".eora-surprise .texts div {flex: 1 1 17em; min-width: 0}"  # side by side where there is room
    ".eora-surprise p {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; margin: .3em 0 1em;"
    " padding-left: .6em; border-left: 4px solid}"
)


def surprise_html(words: Sequence[str], surprises: Mapping[str, Sequence[float]]) -> str:
    """One text once for every model, each token coloured by its surprise -log p in nats. For `IPython.display.HTML`.

    words:     the tokens as text, (seqlen,).
    surprises: "dense" or a method -> nats of every token but the first, (seqlen - 1,), such as of `token_losses`.
    """
    texts = "".join(_text(label, words, values) for label, values in surprises.items())
    style = "".join(f".eora-surprise .s{level} {{{_mark(level)}}}" for level in range(len(LINES)))
    return (
        f'<style>{LAYOUT}{style}</style><div class="eora-surprise"><div><b>{html.escape(_finding(words, surprises))}'
        f'</b></div><div>{_legend()}</div><div class="texts">{texts}</div></div>'
    )


def _mark(level: int) -> str:
    """How a token is drawn."""
    red, green, blue = (round(255 * part) for part in to_rgb(COLOUR))
    fill = f"background: rgba({red}, {green}, {blue}, {OPACITY[level]})"
    return f"{fill}; border-bottom: {LINES[level]}px solid {COLOUR}" if level else "background: none"


def _legend() -> str:
    ends = [
        f"under {STEPS[0]}",
        *(f"{a} to {b}" for a, b in pairwise(STEPS)),
        f"{STEPS[-1]} or more",
    ]
    keys = " ".join(f'<span class="s{level}">&nbsp;{name}&nbsp;</span>' for level, name in enumerate(ends))
    return f"Surprise in nats: {keys}. The thicker the line below, the more. Hover over a token for its number."


def _text(label: str, words: Sequence[str], values: Sequence[float]) -> str:
    """One model's reading: its name, its mean, and the text."""
    first, *others = (html.escape(word).replace("\n", "\u21b5\n") for word in words)
    marked = "".join(
        f'<span class="s{bisect_right(STEPS, value)}" title="{number(value)} nats">{word}</span>'
        for word, value in zip(others, values, strict=True)
    )
    colour = look_of(label).colour
    edge = "currentColor" if colour == INK else colour
    return (
        f"<div><b>{html.escape(look_of(label).name or label)}</b>, {number(fmean(values))} nats a token"
        f'<p style="border-color: {edge}">{first}{marked}</p></div>'
    )


def _finding(words: Sequence[str], surprises: Mapping[str, Sequence[float]]) -> str:
    """The means, and the token that is hit most by the model that reads worst."""
    names = {label: look_of(label).name or label for label in surprises}
    means = {label: fmean(values) for label, values in surprises.items()}
    said = f"Mean surprise of a token: {listed(f'{names[label]} {number(mean)}' for label, mean in means.items())} nats"
    first, worst = next(iter(surprises)), max(means, key=means.__getitem__)
    if worst == first:
        return said
    rises = [b - a for a, b in zip(surprises[first], surprises[worst], strict=True)]
    place = rises.index(max(rises))
    each = listed(f"{number(values[place])} ({names[label]})" for label, values in surprises.items())
    return f"{said}; hit most is {words[place + 1].strip() or words[place + 1]!r}: {each}"
