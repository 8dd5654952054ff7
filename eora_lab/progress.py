"""Progress bars: tqdm's, which in a notebook are lines of text that go when they are done.

tqdm's own notebook bars are widgets. Closed ones leave "Error displaying widget" behind when a page is loaded again.
"""

import io
import sys
from collections.abc import Callable
from typing import Any

from tqdm.std import tqdm as Bar


class CellBar(Bar):
    """A bar in the output of a notebook's cell."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"file": io.StringIO(), "ncols": 80} | options)

    @staticmethod
    def status_printer(_: object) -> Callable[[str], None]:
        """A function that shows a text in the place of the one before."""
        from IPython.display import display

        handle = display(display_id=True)
        handle.display({"text/plain": ""}, raw=True)
        return lambda text: handle.update({"text/plain": text}, raw=True)


def tqdm(*arguments: Any, **options: Any) -> Bar:
    """A bar of tqdm, with its arguments, in the form that this terminal or notebook takes."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return (CellBar if hasattr(shell, "kernel") else Bar)(*arguments, **options)
