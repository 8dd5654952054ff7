"""The rank budget: bytes spent on low-rank paths against the error that is predicted to stay."""

from functools import lru_cache

import ipywidgets
from matplotlib.colors import PowerNorm

from eora_lab.plots import plot_budget, plot_ranks, rank_grid
from eora_lab.run.budget import Budget, LayerSpectrum, allocate_ranks, factor_bytes, predicted_error
from eora_lab.widgets.figure import LiveFigure
from eora_lab.widgets.slider import Slider

OBJECTIVES = ("uniform", "relative", "absolute")
SHARES = tuple(k / 16 for k in range(17))  # of the highest average rank, where curves are drawn


class BudgetExplorer(ipywidgets.VBox):
    """Choose an average rank and how to spread it; see bytes, predicted error and every layer's rank.

    layers: from `layer_spectra`. average, objective: the controls. ranks: what they give, for `compress_model`.
    """

    def __init__(self, layers: dict[str, LayerSpectrum], highest: int = 128):
        self._layers = layers
        self.average = Slider(description="Average rank", max=highest, step=4, value=min(32, highest))
        self.objective = ipywidgets.ToggleButtons(
            options=OBJECTIVES,
            value="relative",
            description="Spread",
            tooltips=(
                "the same rank in every layer",
                "least sum of errors relative to each layer's output",
                "least sum of errors",
            ),
        )
        self.status = ipywidgets.HTML()
        self.curve = LiveFigure("Predicted output error against the megabytes of low-rank factors")
        self.map = LiveFigure("Rank of every layer")
        figures = ipywidgets.HBox([self.curve, self.map], layout={"flex_flow": "row wrap"})
        super().__init__([self.average, self.objective, self.status, figures])
        self.add_class("eora-controls")
        self._allocate = lru_cache(maxsize=None)(
            lambda average, objective: allocate_ranks(layers, average, Budget(objective))
        )
        self._draw(highest)
        self._show()
        self.average.observe(self._show, "value")
        self.objective.observe(self._show, "value")

    def _point(self, average: int | float, objective: str) -> tuple[float, float]:
        """(megabytes, predicted error)."""
        ranks = self._allocate(average, objective)
        return factor_bytes(self._layers, ranks) / 1e6, predicted_error(self._layers, ranks)

    def _draw(self, highest: int) -> None:
        points = {one: [self._point(share * highest, one) for share in SHARES] for one in OBJECTIVES}
        curves = {one: ([x for x, _ in found], [y for _, y in found]) for one, found in points.items()}
        figure = plot_budget(curves, self._point(self.average.value, self.objective.value), size=(5.6, 3.5))
        self._marker = figure.axes[0].lines[-1]
        self.curve.show(figure, [self._marker], "")
        most = max(max(self._allocate(highest, objective).values()) for objective in OBJECTIVES)
        figure = plot_ranks(dict.fromkeys(self._layers, 0), highest=most, size=(5.4, 3.5))
        self._cells = figure.axes[0].images[0]
        self._cells.set_norm(PowerNorm(0.5, 0, most))  # low ranks differ, too, beside the highest of all
        self.map.show(figure, [self._cells], "")

    def _show(self, _=None) -> None:
        self.ranks = self._allocate(self.average.value, self.objective.value)
        megabytes, error = self._point(self.average.value, self.objective.value)
        uniform = self._point(self.average.value, "uniform")[1]
        text = f"{megabytes:.1f} MB of factors, predicted output error {error:.4f} (mean of layers)"
        text += f"; uniform ranks: {uniform:.4f}" if self.objective.value != "uniform" else ""
        self._marker.set_data([megabytes], [error])
        self.curve.redraw(text)
        self._cells.set_data(rank_grid(self.ranks)[1])
        self.map.redraw(text)
        self.status.value = f"<div role='status'>{text}</div>"
