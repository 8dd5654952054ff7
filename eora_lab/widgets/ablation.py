"""The ablation form: build a grid, see its plan, run it, watch its board, stop it anywhere, go on."""

import html
import threading
import time
from pathlib import Path

import ipywidgets
import traitlets

from eora_lab.board import describe
from eora_lab.compensate import SOLVERS
from eora_lab.compress import GRIDS, PRUNERS, QUANTISERS
from eora_lab.compress.format_grids import INTEGER
from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import DENSE
from eora_lab.experiment.store import ResultStore
from eora_lab.experiment.sweep import expand, plan, run_plan
from eora_lab.plots import method_name
from eora_lab.progress import Step, Stopped
from eora_lab.run.plugins import plugin_of
from eora_lab.widgets.board import Board

METHODS = ("none", "svd", "act_s", "qera_approx", "eora", "eora_fisher")  # and those of plugins
NUMBERS = {"group_size": 64, "nsamples": 16, "seqlen": 512, "windows": 10, "window_length": 512}
TEXTS = {"model": "smollm2-135m", "source": "pydoc", "perplexity": "pydoc:heldout"}
# heading -> setting -> what it is called under that heading
GROUPS = {
    "The model": {"model": "name"},
    "Its base": {"compressor": "compressor", "grid": "grid", "bits": "bits", "group_size": "group size"},
    "Its path": {"method": "compensation", "rank": "rank"},
    "Calibration": {"source": "text", "nsamples": "sequences", "seqlen": "tokens of each"},
    "Evaluation": {"perplexity": "text", "windows": "windows", "window_length": "tokens of each"},
}
EVERY = 0.5  # seconds between two looks of the form at a cell that runs


class AblationForm(ipywidgets.VBox):
    """Choose settings, read what they amount to, and run them into a store, in the background.

    Stop takes effect at the next step of the cell that is running, such as a layer; finished cells stay, and what that
    cell has in the cache. Run goes on from there.

    folder:   of the result store.
    start:    values of controls to begin with, such as rank=[8, 16]. Those that are no control (`skip`, `seed`,
              ..., see `Cell`) hold for all cells.
    controls: name of a setting -> its control. run, stop, retry: the buttons. board: of the grid. state: what it is
              doing.
    """

    state = traitlets.Enum(["ready", "running", "stopping", "stopped", "finished", "failed"], "ready")

    def __init__(self, folder: Path | str, **start):
        self._store = ResultStore(folder)
        self._thread: threading.Thread | None = None
        self._fixed = {"inputs": "original"}
        self.controls = make_controls()
        for name, value in start.items():
            if name in self.controls:
                self.controls[name].value = tuple(value) if isinstance(value, list) else value
            else:
                self._fixed[name] = value
        self.dense = ipywidgets.Checkbox(True, description="also the dense model", indent=False)
        self.retry = ipywidgets.Checkbox(False, description="run failed cells again", indent=False)
        self.run = ipywidgets.Button(description="Run", icon="play", button_style="primary")
        self.run.tooltip = "Run the cells that the store does not have"
        self.stop = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.stop.tooltip = "Stop now, within the cell that is running: Run goes on from there"
        self.run.add_class("eora-run")
        self.stop.add_class("eora-stop")
        self._plan, self._status = ipywidgets.HTML(), ipywidgets.HTML()
        self._bar = ipywidgets.IntProgress(0, 0, 1, description="Cells", layout={"width": "min(100%, 30em)"})
        self.board = Board(self._store, [])
        groups = ipywidgets.HBox(
            [self._group(title, names) for title, names in GROUPS.items()], layout={"flex_flow": "row wrap"}
        )
        buttons = ipywidgets.HBox([self.run, self.stop, self.dense, self.retry], layout={"flex_flow": "row wrap"})
        super().__init__([groups, buttons, self._plan, self._bar, self._status, self.board])
        self.add_class("eora-controls")
        self.run.on_click(self._start)
        self.stop.on_click(self._ask_to_stop)
        for control in (*self.controls.values(), self.dense, self.retry):
            control.observe(self._show_plan, "value")
        self._show_plan()

    def _group(self, title: str, names: dict[str, str]) -> ipywidgets.VBox:
        for name, said in names.items():
            self.controls[name].description, self.controls[name].tooltip = said, f"{title}: {said}"
        rows = [ipywidgets.HTML(f"<strong>{title}</strong>"), *(self.controls[name] for name in names)]
        return ipywidgets.VBox(rows, layout={"margin": "0 1.5em 0.5em 0"})

    @property
    def grid(self) -> list[dict]:
        """What the controls say, as `sweep` takes it."""
        values = {name: control.value for name, control in self.controls.items()}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        values = {**self._fixed, **values, "perplexity": values["perplexity"].split()}
        evaluation = {name: values[name] for name in ("model", "perplexity", "windows", "window_length")}
        grid = [{"compressor": DENSE} | evaluation] if self.dense.value else []
        quantisers = [name for name in values["compressor"] if name in QUANTISERS]
        pruners = [name for name in values["compressor"] if name in PRUNERS]
        formats = [name for name in values.pop("grid") if name != INTEGER]
        if quantisers and INTEGER in self.controls["grid"].value:
            grid.append(values | {"compressor": quantisers})
        if quantisers and formats:  # which have bits and groups of their own
            free = {name: value for name, value in values.items() if name not in ("bits", "group_size")}
            grid.append(free | {"compressor": quantisers, "grid": formats})
        if pruners:
            grid.append({"sparsity": "2:4"} | values | {"compressor": pruners, "bits": 16})
        return grid

    def join(self) -> None:
        """Wait until nothing runs any more. (In a notebook this also keeps the buttons waiting.)"""
        if self._thread:
            self._thread.join()

    def _planned(self):
        cells = expand(self.grid)
        return cells, plan(cells, self._store, self.retry.value)

    def _show_plan(self, _=None) -> None:
        if self.state in ("running", "stopping"):
            return
        try:
            self.board.cells, left = self._planned()
            self._plan.value = f"<div role='status'>{html.escape(str(left))}</div>"
            self.run.description = "Go on" if left.todo and left.done else "Run"
            self.run.disabled = not left.todo
            self.board.refresh()
        except EoraLabError as error:
            self._plan.value = f"<div role='alert'>{html.escape(str(error))}</div>"
            self.run.disabled = True

    def _start(self, _=None) -> None:
        if self.state in ("running", "stopping"):
            return
        try:
            cells, left = self._planned()
        except EoraLabError as error:
            self._plan.value = f"<div role='alert'>{html.escape(str(error))}</div>"
            return
        self.state = "running"
        self.run.disabled, self.stop.disabled = True, False
        self._bar.max, self._bar.value = max(len(left.todo), 1), 0
        self._thread = threading.Thread(target=self._work, args=(cells, left), daemon=True)
        self._thread.start()

    def _ask_to_stop(self, _=None) -> None:
        if self.state == "running":
            self.state, self.stop.disabled = "stopping", True
            self._status.value = "stopping at the next step of the cell ..."

    def _work(self, cells, left) -> None:
        """In a thread, so that the form stays alive."""
        failed, looked = 0, 0.0

        def watch(step: Step) -> None:
            nonlocal looked
            if self.state == "stopping":
                raise Stopped
            if time.monotonic() - looked >= EVERY:
                self._tell(left, step, failed)
                looked = time.monotonic()

        try:
            for done, error in enumerate(run_plan(left, cells, self._store, watch=watch), 1):
                failed += bool(error)
                self._bar.value = done
                self.board.refresh()
        except Exception as error:  # the store cannot be written, say: whoever looks at the form should know
            state = "failed"
            self._status.value = f"<div role='alert'>{html.escape(f'{type(error).__name__}: {error}')}</div>"
        else:
            rest = len(left.todo) - self._bar.value
            state = "stopped" if rest else "finished"
            self._status.value = f"{state}: {self._bar.value} cells run, {failed} failed, {rest} left"
        self.stop.disabled, self.state = True, state
        self._show_plan()

    def _tell(self, left, step: Step, failed: int) -> None:
        done = self._bar.value
        text = f"running cell {done + 1} of {len(left.todo)}: {describe(left.todo[done])}: {step}"
        self._status.value = html.escape(text) + (f" ({failed} failed)" if failed else "")
        self.board.follow()


def make_controls() -> dict[str, ipywidgets.ValueWidget]:
    """One control a setting, with its name as the grid has it."""
    look = {"style": {"description_width": "7.5em"}, "layout": {"width": "17em"}}
    controls: dict[str, ipywidgets.ValueWidget] = {}
    added = [name for name in SOLVERS if plugin_of("SOLVERS", name)]
    choices: dict[str, tuple] = {"compressor": (*QUANTISERS, *PRUNERS), "grid": (INTEGER, *GRIDS), "bits": (2, 3, 4)}
    choices |= {"method": (*METHODS, *added), "rank": (4, 8, 16, 32, 64, 128)}
    for name, options in choices.items():
        shown = [(method_name(value), value) for value in options] if name == "method" else options
        rows = min(len(options), 6)
        controls[name] = ipywidgets.SelectMultiple(options=shown, value=options[:1], rows=rows, **look)
    for name, value in NUMBERS.items():
        controls[name] = ipywidgets.IntText(value, **look)
    for name, text in TEXTS.items():
        controls[name] = ipywidgets.Text(text, continuous_update=False, **look)
    return controls
