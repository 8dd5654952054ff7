"""A figure of which only some artists move, redrawn fast enough to follow a slider."""

import io
from collections.abc import Iterable

import ipywidgets

DPI = 100


class LiveFigure(ipywidgets.Image):
    """A matplotlib Figure as a PNG on a white panel of its own, readable on light and dark pages.

    tooltip: says what it shows, also to those who cannot see it.
    """

    def __init__(self, tooltip: str):
        super().__init__(format="png", tooltip=tooltip, layout={"max_width": "100%", "height": "auto"})

    def show(self, figure, moving: Iterable) -> None:
        """Take a Figure and draw it; of its artists, those that move are drawn again by every `redraw`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self._moving = list(moving)
        for artist in self._moving:
            artist.set_animated(True)  # left out when the figure as a whole is drawn
        figure.set_dpi(DPI)
        self._canvas = FigureCanvasAgg(figure)
        self._canvas.draw()
        self._still = self._canvas.copy_from_bbox(figure.bbox)
        self.redraw()

    def redraw(self) -> None:
        """Show the moving artists as they are now. Takes a few milliseconds."""
        from matplotlib.image import imsave

        self._canvas.restore_region(self._still)
        for artist in self._moving:
            artist.axes.draw_artist(artist)
        out = io.BytesIO()
        imsave(out, self._canvas.buffer_rgba(), format="png", pil_kwargs={"compress_level": 1})
        self.value = out.getvalue()
