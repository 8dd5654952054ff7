"""What the eigenvalues of layers say: spectra, losses at every rank, error maps, budgets, the ranks of all layers."""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from jaxtyping import Shaped
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from eora_lab.plots.labels import End, label_ends
from eora_lab.plots.looks import INK, looks, method_name
from eora_lab.plots.scales import plain_log_axis
from eora_lab.plots.style import WIDTH, panels, styled
from eora_lab.plots.words import listed, number, read_out, tell

SIZE = (WIDTH, 3.6)  # inches
SHARE = 0.9  # of a sum of eigenvalues, that a headline asks the directions of
FLOORS = (1e-4, 1e-6)  # of the highest loss and eigenvalue: rounding noise is not worth more decades


@styled()
def plot_spectra(
    spectra: Mapping[str, Sequence[float]], ylabel: str, *, rank: int | None = None, size: tuple[float, float] = SIZE
) -> Figure:
    """Eigenvalues against the number of their direction, largest first, both on logarithmic scales.

    spectra: label -> eigenvalues. rank: marked by a vertical line.
    """
    figure = _curves(spectra, "direction, largest first", ylabel, 1, rank, "", size)
    held = {name: _directions(values) for name, values in spectra.items()}
    few, many = min(held, key=held.__getitem__), max(held, key=held.__getitem__)
    words = [f"{held[name]} of {len(spectra[name])} directions ({method_name(name)})" for name in (few, many)]
    headline = f"{SHARE:.0%} of the sum lies in {' to '.join(dict.fromkeys(words))}"
    return tell(figure, headline, f"{ylabel}, against directions: {_read(spectra, 1)}.")


@styled()
def plot_losses(
    losses: Mapping[str, Sequence[float]],
    ylabel: str,
    rank: int,
    *,
    chosen: str = "",
    size: tuple[float, float] = SIZE,
) -> Figure:
    """The loss that stays at every rank, from rank 0 on; ranks double along the axis, for the first ones matter most.

    losses: method -> losses. rank: marked by a vertical line. chosen: the curve that is drawn strong.
    """
    figure = _curves(losses, "rank", ylabel, 0, rank, chosen, size)
    left = {
        name: values[min(rank, len(values) - 1)] / values[0] if values[0] else 0.0 for name, values in losses.items()
    }
    said = [f"{method_name(name)} leaves {100 * left[name]:.1f} %" for name in sorted(left, key=left.__getitem__)]
    return tell(figure, f"At rank {rank} {listed(said)} of the error", f"{ylabel}, against rank: {_read(losses, 0)}.")


def _directions(values: Sequence[float]) -> int:
    """How many of the largest values make up most of the sum."""
    total = sum(values)
    return 1 + next(i for i, part in enumerate(accumulate(values)) if part >= SHARE * total)


def _read(curves: Mapping[str, Sequence[float]], first: int) -> str:
    ranks = {name: range(first, first + len(values)) for name, values in curves.items()}
    return "; ".join(f"{method_name(name)} {read_out(ranks[name], values)}" for name, values in curves.items())


def _curves(
    curves: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    first: int,
    rank: int | None,
    chosen: str,
    size: tuple[float, float],
) -> Figure:
    """Curves whose first value belongs to `first`, with their names at their ends."""
    top = max(float(max(values)) for values in curves.values())
    low = min((float(v) for values in curves.values() for v in values if v > 0), default=top)
    floor = max(low, FLOORS[first] * top)
    seen = {name: max(i for i, v in enumerate(values) if v >= floor or not i) for name, values in curves.items()}
    figure, [[axes]] = panels(1, 1, size[1], size[0])
    ends = []
    for name, look in looks(list(curves)).items():
        style: dict[str, Any] = {"linewidth": 2.6, "zorder": 3} if name == chosen else {"linewidth": 1.4}
        style |= {"color": look.colour, "linestyle": look.line, "label": method_name(name)}
        axes.plot(range(first, first + len(curves[name])), curves[name], **style)
        end = seen[name]
        ends.append(End(first + end, float(curves[name][end]), method_name(name), look.colour))
    axes.set_yscale("log")
    axes.set_ylim(floor / 1.5, top * 1.5)
    last = first + max(seen.values())
    ticks = [2**k for k in range(16) if 2**k <= last]
    if first:
        plain_log_axis(axes, "x", ticks, base=2)
    else:
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks([0, *ticks], ["0", *map(str, ticks)])
    axes.set_xlim(first, last)
    if rank is not None:
        axes.axvline(rank, color=INK, linestyle="--", linewidth=1)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    label_ends(axes, ends, size[1])
    return figure


@styled()
def plot_error_map(maps: Mapping[str, Shaped[Tensor, "rows columns"]], *, size: tuple[float, float] = SIZE) -> Figure:
    """Where the output error lies: output channels against input directions, the loudest directions on the left.

    maps: label -> `Exploration.error_map`; all in one colour scale.
    """
    figure, [axes] = panels(1, len(maps), size[1], size[0])
    for panel, (name, values) in zip(axes, maps.items(), strict=True):
        extent = (0, 100, 100, 0)
        image = panel.imshow(
            values.clamp_min(1e-4).numpy(), norm=LogNorm(1e-3, 1e2), cmap="viridis", aspect="auto", extent=extent
        )
        panel.set_title(method_name(name))
        panel.set_xlabel("input direction (%)")
    axes[0].set_ylabel("output channel (%)")
    for panel in axes[1:]:
        panel.set_yticks([])
    figure.colorbar(image, ax=list(axes), label="error energy\n(1 = mean without\ncompensation)")
    means = {method_name(name): values.mean().item() for name, values in maps.items()}
    said = [f"{name} {100 * mean:.1f} %" for name, mean in means.items()]
    alt = "Maps of output channels against input directions, loudest first, in one colour scale of error energy."
    return tell(figure, f"Of the output error without compensation there is left: {', '.join(said)}", alt)


@styled()
def plot_budget(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    marked: tuple[float, float] | None = None,
    *,
    size: tuple[float, float] = SIZE,
) -> Figure:
    """Predicted output error against megabytes of low-rank factors, a curve for every way to spread the ranks.

    curves: label -> (megabytes, mean relative output errors). marked: the point that is looked at.
    """
    figure, [[axes]] = panels(1, 1, size[1], size[0])
    ends = []
    for name, look in looks(list(curves)).items():
        x, y = curves[name]
        axes.plot(x, y, color=look.colour, linestyle=look.line, label=name)
        ends.append(End(x[-1], y[-1], name, look.colour))
    axes.set_ylim(bottom=0)
    label_ends(axes, ends, size[1])
    if marked is not None:
        axes.plot(*marked, marker="o", markersize=9, color=INK, linestyle="none", label="chosen")
    axes.set_xlabel("low-rank factors (MB)")
    axes.set_ylabel("predicted output error\n(mean of layers, relative)")
    middle = {name: (x[len(x) // 2], y[len(x) // 2]) for name, (x, y) in curves.items()}
    said = [f"{name} {number(y)} at {number(x)} MB" for name, (x, y) in middle.items()]
    read = "; ".join(f"{name} {read_out([float(one) for one in x], y)}" for name, (x, y) in curves.items())
    return tell(figure, f"Predicted error: {', '.join(said)}", f"Predicted output error against MB of factors: {read}.")


@styled()
def plot_ranks(ranks: Mapping[str, int], highest: int | None = None, *, size: tuple[float, float] = SIZE) -> Figure:
    """The rank of every layer: decoder blocks from left to right, a row for every kind of linear.

    ranks:   full module name -> rank. highest: the end of the colour scale.
    """
    kinds, grid = rank_grid(ranks)
    figure, [[axes]] = panels(1, 1, size[1], size[0])
    image = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=0, vmax=highest or max(ranks.values()) or 1)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("linear")
    figure.colorbar(image, ax=axes, label="rank")
    means = {kind: sum(row) / len(row) for kind, row in zip(kinds, grid, strict=True)}
    least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    headline = f"Most rank goes to {most} (mean {means[most]:.0f}), least to {least} ({means[least]:.0f})"
    read = "; ".join(f"{kind} {min(row)} to {max(row)}" for kind, row in zip(kinds, grid, strict=True))
    return tell(figure, headline, f"Rank of every linear, a row a kind, a column a block: {read}.")


def rank_grid(ranks: Mapping[str, int]) -> tuple[list[str], list[list[int]]]:
    """(kinds of linears, their ranks in every block) from full module names such as model.layers.3.mlp.up_proj."""
    kinds: dict[str, dict[int, int]] = {}
    for name, rank in ranks.items():
        block, kind = re.findall(r"\.(\d+)\.(.*)", name)[0]
        kinds.setdefault(kind, {})[int(block)] = rank
    blocks = 1 + max(block for row in kinds.values() for block in row)
    return [kind.rpartition(".")[2] for kind in kinds], [
        [row.get(block, 0) for block in range(blocks)] for row in kinds.values()
    ]
