"""`eora-lab sweep`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eora_lab.cli.early import check_cells, check_figure

CELLS_FAILED = 3  # exit code


@dataclass(frozen=True)
class Sweep:
    """Run a grid of experiments into a result store; start it again to go on after a stop of any kind.

    The grid is a YAML file: settings with their values, a list of values being an axis, or a list of such grids.
    Settings are those of a recipe (see `eora-lab compress --help`) and model, dtype, source, nsamples, seqlen, share,
    first, seed, perplexity (texts), windows, window_length, tasks, limit, num_fewshot, rank_only (a regular expression:
    compressed layers that it does not match get rank 0). `compressor: dense` is the model as it is.

    Exit code 3 when cells failed, now or before. Those that the machine failed (no memory, data that is not there) are
    run again the next time, others with --retry-failed.
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
    batch_size: int = 8
    """requests of a task that run at once"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> int:
        from eora_lab.errors import EoraLabError
        from eora_lab.experiment.store import ResultStore, check_export, scores
        from eora_lab.experiment.sweep import expand, on_model, plan, read_grid, sweep, tell_failures
        from eora_lab.run.intervals import paired

        check_figure(self.figure)
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
            frame = sweep(
                grid,
                store,
                self.engine,
                self.workers,
                self.address,
                self.retry_failed,
                self.batch_size,
                self.device,
            )
            done = 0 if frame.empty else sum(frame["status"] == "done")
            code = 0 if done == len(expand(grid)) else CELLS_FAILED
            shown = ("perplexity", "bos", "tier")  # whether they vary or not
            varied = [name for name in frame if frame[name].map(str).nunique() > 1 or name.startswith(shown)]
            if varied:
                print(frame[[name for name in varied if not name.startswith("cost")]].to_string(index=False))
            if self.figure and done:
                from eora_lab.plots import plot_sweep, save

                print(*(f"wrote {path}" for path in save(plot_sweep(frame), self.figure)), sep="\n")
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
