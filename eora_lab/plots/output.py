"""How figures leave: as files that are the same bytes every time, and as a cell's output with a text for the blind.

An SVG holds both inks: it is dark on white, and light on dark where the page around it is dark.
"""

import html
import io
import re
from functools import partial
from pathlib import Path
from urllib.parse import quote

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from eora_lab.files import write_atomically
from eora_lab.plots.looks import DARK_INK, DARK_PAPER, INK, PAPER
from eora_lab.plots.style import STYLE, styled
from eora_lab.plots.words import alt_text, headline

THEME = (
    f"svg {{color: {INK}}} .paper {{fill: {PAPER}}}"
    f"@media (prefers-color-scheme: dark) {{svg {{color: {DARK_INK}}} .paper {{fill: {DARK_PAPER}}}}}"
)
# a page says by `color-scheme` whether it is dark, but JupyterLab does not
LAB = "<style>[data-jp-theme-light='false'] img.eora-figure {color-scheme: dark}</style>"
PLAIN = " !$'()*+,-./:;<=>?@[]^_`{|}~\n"  # what may stand in an address within double quotes


def svg(figure: Figure) -> str:
    """A figure that is readable on white and dark pages, without dates."""
    out = io.StringIO()
    with styled():
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue().replace(f'style="fill: {PAPER}"', 'class="paper"', 1).replace(INK, "currentColor")
    said = f"<title>{html.escape(headline(figure))}</title>\n <desc>{html.escape(alt_text(figure))}</desc>"
    return re.sub(r"<svg [^>]*>", lambda tag: f"{tag[0]}\n <style>{THEME}</style>\n {said}", text, count=1)


def save(figure: Figure, path: Path | str) -> list[Path]:
    """Write a figure as .png and .svg, without dates. Returns both paths. Raises EoraLabError when it cannot."""
    png, vectors = Path(path).with_suffix(".png"), Path(path).with_suffix(".svg")
    with styled():
        metadata = {"Software": None, "Title": headline(figure), "Description": alt_text(figure)}
        write_atomically(png, partial(figure.savefig, format="png", metadata=metadata))
    write_atomically(vectors, partial(Path.write_text, data=svg(figure), encoding="utf-8"))
    return [png, vectors]


def as_html(figure: Figure) -> str:
    """A figure as a page shows it: a picture that follows the theme, with its text."""
    said = html.escape(alt_text(figure), quote=True)
    source = "data:image/svg+xml," + quote(svg(figure), safe=PLAIN)
    return f'{LAB}<img class="eora-figure" style="max-width: 100%" alt="{said}" src="{source}">'


def use_style() -> None:
    """Let all figures of a notebook look like those of the package, its own too, and follow JupyterLab's theme."""
    plt.style.use(STYLE)
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if shell := get_ipython():
        plt.switch_backend(plt.get_backend())  # which, when it is loaded, sets how figures are shown
        shell.display_formatter.formatters["text/html"].for_type(Figure, as_html)
