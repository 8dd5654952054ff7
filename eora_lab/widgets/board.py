"""The board of a result store in a notebook."""

from collections.abc import Sequence
from pathlib import Path

import anywidget
import traitlets

from eora_lab.board.data import board, now
from eora_lab.board.page import module, style
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.store import ResultStore
from eora_lab.widgets.slider import RING

RENDER = """
export default {
  async render({ model, el }) {
    const keep = choice => { model.set("choice", choice); model.save_changes(); };
    const data = () => ({ ...model.get("data"), running: model.get("running") });
    const shown = await mount(el, data(), model.get("choice"), keep, () => model.send({ event: "again" }));
    const follow = () => shown.update(data());
    for (const one of ["data", "running"]) model.on(`change:${one}`, follow);
    return () => { for (const one of ["data", "running"]) model.off(`change:${one}`, follow); };
  },
};
"""


class Board(anywidget.AnyWidget):
    """A table of a store's cells with charts: any two columns, every cell against a baseline, two layer by layer.

    cells:  of a grid, of which those that are not in the store are shown, too; None: all that the store has.
    data:   what is shown. running: what runs now. choice: what the reader chose (baseline, cell, x, y, measure, words,
            hidden columns), which stays when the page of the notebook is loaded again.
    """

    _esm = module() + RENDER
    _css = style() + RING
    data = traitlets.Dict().tag(sync=True)
    running: traitlets.List = traitlets.List().tag(sync=True)
    choice = traitlets.Dict().tag(sync=True)

    def __init__(self, store: ResultStore | Path | str, cells: Sequence[Cell] | None = None):
        self._store = store if isinstance(store, ResultStore) else ResultStore(store)
        self.cells = cells
        super().__init__()
        self.refresh()
        self.on_msg(lambda _, message, __: self.refresh() if message == {"event": "again"} else None)

    def refresh(self) -> None:
        """Read the store again."""
        self.follow()
        self.data = board(self._store, self.cells)

    def follow(self) -> None:
        """Look only at what runs."""
        self.running = now(self._store)
