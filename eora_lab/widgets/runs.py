"""The run browser: the cells of a result store, filtered, sorted, and one of them in full."""

import html
import json
from pathlib import Path

import ipywidgets

from eora_lab.experiment.store import ResultStore, row
from eora_lab.widgets.table import html_table, interesting, settings

WIDE = {"width": "min(100%, 46em)"}


class RunBrowser(ipywidgets.VBox):
    """Filter and sort the cells of a store; choose one to see its settings, results, layers, versions and cost.

    filter: words that a cell's row must all contain, such as "gptq eora". sort, descending, cell, refresh: the other
    controls. frame: the rows that are shown.
    """

    def __init__(self, store: ResultStore | Path | str):
        self._store = store if isinstance(store, ResultStore) else ResultStore(store)
        self.filter = ipywidgets.Text(description="Filter", placeholder="words, such as: rtn eora", layout=WIDE)
        self.sort = ipywidgets.Dropdown(description="Sort by")
        self.descending = ipywidgets.Checkbox(description="largest first", indent=False)
        self.refresh = ipywidgets.Button(description="Refresh", icon="refresh", tooltip="Read the store again")
        self.cell = ipywidgets.Dropdown(description="Cell", layout=WIDE)
        self._table, self._details = ipywidgets.HTML(), ipywidgets.HTML()
        order = ipywidgets.HBox([self.sort, self.descending, self.refresh], layout={"flex_flow": "row wrap"})
        super().__init__([self.filter, order, self._table, self.cell, self._details])
        self.read()
        self.refresh.on_click(self.read)
        for control in (self.filter, self.sort, self.descending):
            control.observe(self._show, "value")
        self.cell.observe(self._show_cell, "value")

    def read(self, _=None) -> None:
        """Read the store again."""
        import pandas

        self._cells = list(self._store.cells())
        self._all = pandas.DataFrame([row(cell) for cell in self._cells])
        self._columns = interesting(self._all) if len(self._all) else []
        chosen = self.sort.value
        self.sort.options = self._columns
        self.sort.value = chosen if chosen in self._columns else next(iter(self._columns), None)
        self._show()

    def _show(self, _=None) -> None:
        if not len(self._all):
            self.frame = self._all
            self._table.value, self.cell.options = "The store has no cells yet.", []
            return
        chosen = self.cell.value
        words = self.filter.value.lower().split()
        texts = self._all.map(lambda value: str(value).lower()).agg(" ".join, axis=1)
        frame = self._all[[all(word in text for word in words) for text in texts]]
        if self.sort.value:
            frame = frame.sort_values(self.sort.value, ascending=not self.descending.value, key=by_number)
        self.frame = frame
        count = f"<p>{len(frame)} of {len(self._all)} cells</p>"
        self._table.value = count + html_table(frame, self._columns)
        settled = frame[settings(self._all)]
        labels = [" · ".join(filter(None, map(short, values))) for values in settled.itertuples(index=False)]
        self.cell.options = [
            (f"{place}: {label}", index)
            for place, (label, index) in enumerate(zip(labels, frame.index, strict=True), 1)
        ]
        self.cell.value = chosen if chosen in frame.index else next(iter(frame.index), None)
        self._show_cell()

    def _show_cell(self, _=None) -> None:
        import pandas

        if self.cell.value is None:
            self._details.value = ""
            return
        cell = self._cells[self.cell.value]
        result = dict(cell["result"] or {})
        layers = result.pop("layers", [])
        result.pop("window_losses", None)
        parts = [("Error", cell["error"])] if cell["error"] else []
        parts += [("Result", result), ("Settings", cell["config"]), ("Cost (seconds, bytes)", cell["cost"])]
        parts += [("Environment", cell["environment"])]
        text = "".join(
            f"<details {'open' if place == 0 else ''}><summary>{title}</summary><pre>"
            f"{html.escape(value if isinstance(value, str) else json.dumps(value, indent=1))}</pre></details>"
            for place, (title, value) in enumerate(parts)
        )
        if layers:
            frame = pandas.DataFrame(layers, columns=["layer", "rank", "error before", "error after"])
            text += f"<details><summary>Layers</summary>{html_table(frame)}</details>"
        self._details.value = text


def short(value: object) -> str:
    """A setting in few letters, none where a cell does not have it; whole numbers that pandas made floats are whole."""
    if isinstance(value, float):
        return "" if value != value else f"{value:g}"
    return str(value)


def by_number(column):
    """Numbers by size; other columns as text."""
    import pandas

    return column if pandas.api.types.is_numeric_dtype(column) else column.map(str)
