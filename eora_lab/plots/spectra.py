"""What a layer's eigenvalues say: spectra, error maps, budgets and the rank of every layer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Shaped
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from eora_lab.plots.style import looks, method_name, panels, styled


def plot_spectra(
    spectra: Mapping[str, Sequence[float]],
    ylabel: str,
    *,
    first: int = 1,
    rank: int | None = None,
    chosen: str = "",
    size: tuple[float, float] = (6.4, 3.6),
) -> Figure:
    """Curves over the rank on a logarithmic scale: eigenvalues, or the loss that each rank leaves.

    spectra: method, or any label -> values, the first of which belongs to rank `first`.
    rank:    marked by a vertical line. chosen: the curve that is drawn strong.
    """
    figure, axes = _panels(1, size)
    for name, look in looks(list(spectra)).items():
        style: dict[str, Any] = {"linewidth": 2.6, "zorder": 3} if name == chosen else {"linewidth": 1.4}
        style |= {"color": look.colour, "linestyle": look.line, "label": method_name(name)}
        axes[0].plot(range(first, first + len(spectra[name])), spectra[name], **style)
    top = max(float(max(values)) for values in spectra.values())
    low = min((float(v) for values in spectra.values() for v in values if v > 0), default=top)
    axes[0].set_yscale("log")
    axes[0].set_ylim(max(low, 1e-6 * top) / 1.5, top * 1.5)  # rounding noise is not worth six decades
    if rank is not None:
        axes[0].axvline(rank, color="black", linestyle="--", linewidth=1)
    axes[0].set_xlabel("rank")
    axes[0].set_ylabel(ylabel)
    axes[0].legend(framealpha=0.9)
    return figure


def plot_error_map(
    maps: Mapping[str, Shaped[Tensor, "rows columns"]], *, size: tuple[float, float] | None = None
) -> Figure:
    """Where the output error lies: output channels against input directions, the loudest directions on the left.

    maps: label -> `Exploration.error_map`; all in one colour scale.
    """
    figure, axes = _panels(len(maps), size or (3.2 * len(maps) + 1.2, 3.6))
    for panel, (name, values) in zip(axes, maps.items(), strict=True):
        extent = (0, 100, 100, 0)
        image = panel.imshow(
            values.clamp_min(1e-4).numpy(), norm=LogNorm(1e-3, 1e2), cmap="viridis", aspect="auto", extent=extent
        )
        panel.set_title(method_name(name))
        panel.set_xlabel("input direction, loudest first (%)")
    axes[0].set_ylabel("output channel (%)")
    for panel in axes[1:]:
        panel.set_yticks([])
    figure.colorbar(image, ax=list(axes), label="error energy\n(1 = mean without compensation)")
    return figure


def plot_budget(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    marked: tuple[float, float] | None = None,
    *,
    size: tuple[float, float] = (6.4, 3.6),
) -> Figure:
    """Predicted output error against megabytes of low-rank factors, a curve for every way to spread the ranks.

    curves: label -> (megabytes, mean relative output errors). marked: the point that is looked at.
    """
    figure, axes = _panels(1, size)
    for name, look in looks(list(curves)).items():
        axes[0].plot(*curves[name], color=look.colour, linestyle=look.line, label=name)
    if marked is not None:
        axes[0].plot(*marked, marker="o", markersize=9, color="black", linestyle="none", label="chosen")
    axes[0].set_xlabel("low-rank factors (MB)")
    axes[0].set_ylabel("predicted output error\n(mean of layers, relative)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(framealpha=0.9)
    return figure


def plot_ranks(
    ranks: Mapping[str, int], highest: int | None = None, *, size: tuple[float, float] = (6.4, 3.6)
) -> Figure:
    """The rank of every layer: decoder blocks from left to right, a row for every kind of linear.

    ranks:   full module name -> rank. highest: the end of the colour scale.
    """
    kinds, grid = rank_grid(ranks)
    figure, axes = _panels(1, size)
    image = axes[0].imshow(grid, cmap="viridis", aspect="auto", vmin=0, vmax=highest or max(ranks.values()) or 1)
    axes[0].set_yticks(range(len(kinds)), kinds)
    axes[0].set_xlabel("decoder block")
    figure.colorbar(image, ax=axes[0], label="rank")
    return figure


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


def _panels(count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Panels beside each other in a figure of the given inches."""
    with styled():
        figure, [axes] = panels(1, count, float(size[0]) / count, float(size[1]))
    return figure, axes
