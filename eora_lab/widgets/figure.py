"""A figure of which only some artists move, redrawn fast enough to follow a slider."""

import base64
import html
import io
from collections.abc import Iterable

import ipywidgets

DPI = 100


class LiveFigure(ipywidgets.HTML):
    """A matplotlib Figure as a PNG on a white panel of its own, readable on light and dark pages.

    An `ipywidgets.Image` has no text for those who cannot see it, and breaks when it is given a tooltip.

    A headline would be of one moment; the text for the blind has the numbers of now.

    says: what it shows. png: the picture as it is now.
    """

    def __init__(self, says: str):
        super().__init__(layout={"max_width": "100%"})
        self._says = says

    def show(self, figure, moving: Iterable, numbers: str) -> None:
        """Take a Figure and draw it; of its artists, those that move are drawn again by every `redraw`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure.suptitle("")
        self._moving = list(moving)
        for artist in self._moving:
            artist.set_animated(True)  # left out when the figure as a whole is drawn
        figure.set_dpi(DPI)
        self._canvas = FigureCanvasAgg(figure)
        self._canvas.draw()
        self._still = self._canvas.copy_from_bbox(figure.bbox)
        self.redraw(numbers)

    def redraw(self, numbers: str) -> None:
        """Show the moving artists as they are now, and say their numbers. Takes a few milliseconds."""
        from matplotlib.image import imsave

        self._canvas.restore_region(self._still)
        for artist in self._moving:
            artist.axes.draw_artist(artist)
        out = io.BytesIO()
        imsave(out, self._canvas.buffer_rgba(), format="png", pil_kwargs={"compress_level": 1})
        self.png = out.getvalue()
        source = f"data:image/png;base64,{base64.b64encode(self.png).decode()}"
        said = html.escape(f"{self._says}. {numbers}", quote=True)
        self.value = f'<img alt="{said}" title="{said}" src="{source}">'
