"""`eora-lab sweep`."""

import shlex
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from eora_lab.cli.early import check_cells, check_figure
from eora_lab.errors import EoraLabError

if TYPE_CHECKING:
    from eora_lab.experiment.cells import Cell
    from eora_lab.experiment.store import ResultStore

CELLS_FAILED, CELLS_LEFT = 3, 4  # exit codes
OF_ONE_RUN = ("grid", "store", "retry_failed", "paired", "dry_run", "export", "figure", "until")  # going on needs none


@dataclass(frozen=True)
class Sweep:
    """Run a grid of experiments into a result store; start it again to go on after a stop of any kind.

    The grid is a YAML file: settings with their values, a list of values being an axis, or a list of such grids.
    Settings are those of a recipe (see `eora-lab compress --help`) and model, dtype, source, nsamples, seqlen, share,
    first, seed, perplexity (texts), windows, window_length, tasks, limit, num_fewshot, rank_only (a regular expression:
    compressed layers that it does not match get rank 0). `compressor: dense` is the model as it is.

    However it ends, it leaves a page in the store, board.html, which says what was asked, found, decided and not, what
    it cost, what failed, and how to go on. `eora-lab board STORE` shows the same while it runs.

    Exit code 3 when cells failed, now or before, 4 when none failed and --until left some. Those that the machine
    failed (no memory, data that is not there) are run again the next time, others with --retry-failed.
    """

    grid: Annotated[Path, tyro.conf.Positional]
    """YAML file, or the name of an ablation: rank, calibration-size, source, inputs, group-size, factor-bits, modules,
    equal-bytes, task-mix, rivals, formats, beyond, front, front-small"""
    store: Path
    """folder of the results, one file a cell"""
    engine: Literal["local", "ray"] = "local"
    """local: one cell after another; ray: one cell a task"""
    workers: int = 2
    """processes of a Ray started on this machine"""
    address: str | None = None
    """of a running Ray cluster, which must see the same store folder"""
    retry_failed: bool = False
    """run cells again that failed before"""
    model: str | None = None
    """run the grid on this model, in place of the one it names"""
    paired: bool = False
    """also print how every cell differs from the grid's first one, with paired 95 % intervals"""
    dry_run: bool = False
    """only say what is left to do"""
    export: tuple[Path, ...] = ()
    """write the store's table as .parquet, .csv, .md or .tex"""
    figure: Path | None = None
    """draw the grid's results as .png and .svg: against the setting that it varies, or against bits a weight"""
    until: str = ""
    """time of day, such as 07:00, at which it stops, within a cell too; what that cell has in the cache of the store
    stays, and the same command goes on"""
    batch_size: int = 8
    """requests of a task that run at once"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> int:
        from eora_lab.experiment.store import ResultStore, check_export, scores
        from eora_lab.experiment.sweep import expand, on_model, plan, read_grid, sweep, tell_failures
        from eora_lab.run.intervals import paired

        check_figure(self.figure)
        until = next_time(self.until) if self.until else None
        for path in self.export:
            check_export(path)
        grid, code = read_grid(self.grid), 0
        if self.model is not None:
            grid = on_model(grid, self.model)
        check_cells(expand(grid))
        store = ResultStore(self.store)
        if self.dry_run:
            left = plan(expand(grid), store, self.retry_failed, self.device)
            print(left)
            tell_failures(left.reasons)
        else:
            try:
                frame = sweep(
                    grid,
                    store,
                    self.engine,
                    self.workers,
                    self.address,
                    self.retry_failed,
                    self.batch_size,
                    self.device,
                    until=until,
                )
            except (KeyboardInterrupt, SystemExit):
                self.write_page(expand(grid), store)
                raise
            done = 0 if frame.empty else sum(frame["status"] == "done")
            out_of_time = until is not None and datetime.now() >= until and done == len(frame)
            code = 0 if done == len(expand(grid)) else CELLS_LEFT if out_of_time else CELLS_FAILED
            shown = ("perplexity", "bos", "tier")  # whether they vary or not
            varied = [name for name in frame if frame[name].map(str).nunique() > 1 or name.startswith(shown)]
            if varied:
                print(frame[[name for name in varied if not name.startswith("cost")]].to_string(index=False))
            if self.figure and done:
                from eora_lab.plots import plot_sweep, save

                print(*(f"wrote {path}" for path in save(plot_sweep(frame), self.figure)), sep="\n")
            self.write_page(expand(grid), store)
        if self.paired:
            first, *others = [scores(store.get(cell.config()) or {"result": None}) for cell in expand(grid)]
            print("minus the first row (log perplexity: negative is better; a score: positive is better):")
            for row, other in enumerate(others, 1):
                for measure in (name for name in first if name in other):
                    try:
                        interval = paired(first[measure], other[measure])
                        print(f"row {row}: {measure} {interval}{'' if interval.decided else '  undecided'}")
                    except EoraLabError as error:
                        print(f"row {row}: {measure}: {error}")
        for path in self.export:
            store.export(path)
            print(f"wrote {path}")
        return code

    def write_page(self, cells: "list[Cell]", store: "ResultStore") -> None:
        """Leave the page of the grid in the store."""
        from eora_lab.board import NAME, board, write_page

        write_page(store.folder / NAME, board(store, cells, figure=True, go_on=self.go_on(cells, store)))
        print(f"wrote {store.folder / NAME}")

    def go_on(self, cells: "list[Cell]", store: "ResultStore") -> list[tuple[str, str]]:
        """(why, command) of what can be done next."""
        from eora_lab.board import duration
        from eora_lab.experiment.estimate import seconds
        from eora_lab.run.plugins import plugin_files

        kept = [store.get(cell.config()) for cell in cells]
        left = [cell for cell, one in zip(cells, kept, strict=True) if one is None]
        failed = sum(1 for one in kept if one and one["status"] == "failed")
        command = ["eora-lab", "sweep", str(self.grid), "--store", str(self.store)]
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in OF_ONE_RUN and value != one.default:
                command += [f"--{one.name.replace('_', '-')}", str(value)]
        for path in plugin_files():
            command += ["--plugin", str(path)]
        found = []
        if left:
            time, basis = seconds(left, list(store.cells()), self.device)
            about = "" if time is None else f", about {duration(time)} of one worker ({basis})"
            found.append((f"Cells that are left: {len(left)}{about}. The same command goes on:", shlex.join(command)))
        if failed:
            found.append((f"Cells that failed: {failed}. To run them again:", shlex.join([*command, "--retry-failed"])))
        return [
            *found,
            ("To look again later, or while more runs:", shlex.join(["eora-lab", "board", str(self.store)])),
        ]


def next_time(text: str) -> datetime:
    """The next moment at which a clock here shows that time of day. Raises EoraLabError when it is none."""
    try:
        hour = datetime.strptime(text, "%H:%M").time()
    except ValueError as error:
        raise EoraLabError(f"--until takes a time of day such as 07:00, not {text!r}") from error
    now = datetime.now()
    today = datetime.combine(now.date(), hour)
    return today if today > now else today + timedelta(days=1)
