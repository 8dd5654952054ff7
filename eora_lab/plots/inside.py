"""What compression breaks inside: a curve over the blocks, and maps of the heads and linears of all blocks."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from jaxtyping import Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from eora_lab.plots.labels import End, label_ends
from eora_lab.plots.looks import INK, Look, looks, method_name
from eora_lab.plots.style import WIDTH, panels, styled
from eora_lab.plots.words import listed, number, read_out, tell

SIZE = (WIDTH, 3.2)  # inches
DENSE = "dense"
ROW = 0.17  # inches of a row of a map, at least
MARKERS = 8  # on a line
FLOOR = 1e-4  # of the largest error: rounding noise is not worth more decades


def look_of(label: str) -> Look:
    """Of a method, or of the dense model, which is drawn in the colour of texts."""
    return Look(INK, "o", "--", DENSE) if label == DENSE else looks([label])[label]


@styled()
def plot_blocks(curves: Mapping[str, Sequence[float]], ylabel: str, *, size: tuple[float, float] = SIZE) -> Figure:
    """A quantity after every decoder block, a line for a method or "dense".

    curves: label -> a value a block, such as `stream_errors(...).median(1).values.tolist()`.
    ylabel: what it is, with its unit; its first line stands in the headline.
    """
    figure, [[axes]] = panels(1, 1, size[1], size[0])
    ends = []
    for name, values in curves.items():
        look, last = look_of(name), len(values) - 1
        style: dict[str, Any] = {
            "color": look.colour,
            "marker": look.marker,
            "linestyle": look.line,
            "label": method_name(name),
        }
        axes.plot(range(len(values)), values, markevery=max(len(values) // MARKERS, 1), **style)
        ends.append(End(last, float(values[-1]), method_name(name), look.colour))
    axes.set_xlim(0, max(last, 1))
    axes.set_ylim(0, 1.05 * max(max(values) for values in curves.values()) or 1)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel("decoder block")
    axes.set_ylabel(ylabel)
    label_ends(axes, ends, size[1])
    what = ylabel.split("\n")[0].rstrip(",")
    said = listed(f"{number(values[-1])} ({method_name(name)})" for name, values in curves.items())
    read = "; ".join(f"{method_name(name)} {read_out(range(len(v)), v)}" for name, v in curves.items())
    whole = " ".join(ylabel.split())
    return tell(figure, f"{what[0].upper()}{what[1:]} after the last block: {said}", f"{whole}, by block: {read}.")


@styled()
def plot_heads(errors: Mapping[str, Mapping[str, Float[Tensor, " heads"]]]) -> Figure:
    """Relative errors of all attention heads: blocks from left to right, a row a head, a panel a method.

    errors: method -> `head_errors`.
    """
    frames = {
        method: pandas.DataFrame({_block(name): pandas.Series(values.tolist()) for name, values in found.items()})
        for method, found in errors.items()
    }
    return _maps(frames, "head", "error of its output\n(1 = as large as it)")


@styled()
def plot_layers(errors: Mapping[str, Mapping[str, float]]) -> Figure:
    """Errors of all linears: blocks from left to right, a row for every kind of linear, a panel a method.

    errors: method -> full module name -> relative output error E|(W - W')x|^2 / E|Wx|^2, such as those of a report.
    """
    frames = {}
    for method, found in errors.items():
        rows = [(name.rpartition(".")[2], _block(name), value) for name, value in found.items()]
        frame = pandas.DataFrame(rows, columns=["linear", "block", "error"])
        kinds = list(dict.fromkeys(frame["linear"]))
        frames[method] = frame.pivot_table(index="linear", columns="block", values="error").reindex(kinds)
    return _maps(frames, "linear", "error, share of the\noutput's energy")


def _block(name: str) -> int:
    """The number of the block that a module is in."""
    return int(re.findall(r"\.(\d+)\.", name)[0])


def _maps(frames: Mapping[str, pandas.DataFrame], part: str, unit: str) -> Figure:
    """A map a method, in one logarithmic scale of colours."""
    first = next(iter(frames.values()))
    values = np.concatenate([frame.to_numpy(float).ravel() for frame in frames.values()])
    high = np.nanmax(values) or 1.0
    norm = LogNorm(max(FLOOR * high, min(values[values > 0], default=0.0)), high)
    figure, [axes] = panels(1, len(frames), max(ROW * len(first) + 1.4, 2.6), sharey="row")
    for panel, (method, frame) in zip(axes, frames.items(), strict=True):
        whole = frame.reindex(columns=range(frame.columns.max() + 1))  # blocks without it stay blank
        image = panel.imshow(whole.to_numpy(float), norm=norm, cmap="viridis", aspect="auto")
        panel.set_title(method_name(method))
        panel.set_xlabel("decoder block")
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if part == "linear":
        axes[0].set_yticks(range(len(first)), first.index)
    else:
        axes[0].yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes[0].set_ylabel(part)
    figure.colorbar(image, ax=list(axes), label=unit)
    block = first.max().idxmax()
    row = first[block].idxmax()
    name = row if part == "linear" else f"{part} {row}"
    medians = listed(f"{number(np.nanmedian(frame.to_numpy()))} ({method_name(m)})" for m, frame in frames.items())
    worst = listed(number(frame.loc[row, block]) for frame in frames.values())
    read = "; ".join(f"{method_name(m)} {read_out(list(f), f.median().tolist(), 'block ')}" for m, f in frames.items())
    alt = f"A map a method, a row a {part}, a column a block. Medians of blocks: {read}."
    return tell(figure, f"Error of the median {part}: {medians}; of the worst, {name} of block {block}: {worst}", alt)
