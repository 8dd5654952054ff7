"""The spectrum explorer: what each rank of each method buys in a layer, and where the error stays."""

from collections.abc import Sequence

import ipywidgets

from eora_lab.measure.explore import Exploration
from eora_lab.plots import method_name, plot_error_map, plot_losses
from eora_lab.widgets.figure import LiveFigure

METHODS = ("svd", "act_s", "qera_approx", "eora")
WIDE = {"width": "min(100%, 46em)"}


class SpectrumExplorer(ipywidgets.VBox):
    """Pick a layer, a method and a rank: the error at every rank, and a map of what is left at this one.

    A layer is solved when it is first looked at, once a method; moves of the rank cost a few milliseconds after that.

    layer, method, rank: the controls. curves, map: the figures. status: their numbers in words.
    """

    def __init__(self, exploration: Exploration, methods: Sequence[str] = METHODS):
        self._exploration, self._methods, self._shown = exploration, list(methods), ""
        self.layer = ipywidgets.Dropdown(options=exploration.layers, description="Layer", layout=WIDE)
        self.method = ipywidgets.ToggleButtons(
            options=[(method_name(name), name) for name in methods], value=self._methods[-1], description="Method"
        )
        self.rank = ipywidgets.IntSlider(32, description="Rank", min=0, max=32, layout=WIDE)
        self.rank.add_class("eora-rank")
        self.status = ipywidgets.HTML()
        self.curves = LiveFigure("Relative output error at every rank, a curve for every method")
        self.map = LiveFigure("Map of the output error that is left: output channels against input directions")
        figures = ipywidgets.HBox([self.curves, self.map], layout={"flex_flow": "row wrap"})
        super().__init__([self.layer, self.method, self.rank, self.status, figures])
        self._show_layer()
        self.layer.observe(self._show_layer, "value")
        self.method.observe(self._show_method, "value")
        self.rank.observe(self._show_rank, "value")

    def _show_layer(self, _=None) -> None:
        self.status.value = "Solving this layer ..."
        layer = self.layer.value
        self._losses = {name: self._exploration.losses(layer, name).tolist() for name in self._methods}
        self.rank.max = self._exploration.highest(layer)  # which may lower its value
        self._shown = layer
        self._show_method()

    def _show_method(self, _=None) -> None:
        method, rank, told = self.method.value, self.rank.value, self._told()
        curves = plot_losses(self._losses, "relative output error", rank, chosen=method, size=(5.8, 3.5))
        self._line = curves.axes[0].lines[-1]
        self.curves.show(curves, [self._line], told)
        map = plot_error_map({method: self._exploration.error_map(self.layer.value, method, rank)}, size=(4.6, 3.5))
        self._image = map.axes[0].images[0]
        self.map.show(map, [self._image], told)
        self.status.value = f"<div role='status'>{told}</div>"

    def _show_rank(self, _=None) -> None:
        if self._shown != self.layer.value:
            return  # it is about to be shown as a whole
        told = self._told()
        self._line.set_xdata([self.rank.value] * 2)
        self.curves.redraw(told)
        left = self._exploration.error_map(self.layer.value, self.method.value, self.rank.value)
        self._image.set_data(left.clamp_min(1e-4).numpy())
        self.map.redraw(told)
        self.status.value = f"<div role='status'>{told}</div>"

    def _told(self) -> str:
        """What this rank of this method gives, in words."""
        rank, method = self.rank.value, self.method.value
        before, left = self._losses[method][0], self._losses[method][rank]
        best = self._losses.get("eora", self._losses[method])
        same = next((k for k, loss in enumerate(best) if loss <= left), rank)
        text = f"{method_name(method)} at rank {rank}: output error {before:.4f} → {left:.4f}"
        text += f" ({1 - left / before:.1%} removed)" if before else ""
        if method != "eora" and "eora" in self._losses:
            text += f"; EoRA needs rank {same} for this"
        return text
