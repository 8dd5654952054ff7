"""`eora-lab paper`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from eora_lab.cli.early import check_cells, check_figure
from eora_lab.cli.sweep import CELLS_FAILED

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Paper:
    """Run the rows of one of the paper's tables on a model, and print them beside the published figures.

    Without a table: all of them as a checklist: what is measured, what the rest will cost, and the command of each.
    `--scale full` is the paper's setting and wants a GPU; `--scale small` runs the same rows on a small model with
    fewer samples (WikiText-2 perplexity, 200 questions of ARC-Easy, a quarter of the rank). Start it again to go on.
    """

    table: Annotated[str, tyro.conf.Positional] = ""
    """T1, T2, T4 to T8, T10, T13 to T16, or T18; none: the checklist, and nothing runs"""
    model: str = "smollm2-135m"
    """embedded model, hub id, or folder"""
    scale: Literal["full", "small"] = "full"
    """the paper's setting, or a small one"""
    published: str = ""
    """whose published rows: LLaMA3-8B, ...; the table's first model if not given"""
    released: bool = False
    """do as the authors' code where it differs from their paper (Act-S scale, share of the task in a mix)"""
    store: Path = Path("runs/paper")
    """folder of the results"""
    dry_run: bool = False
    """run nothing: say what is left to do, and print what the store holds as it is"""
    figure: Path | None = None
    """draw the table as .png and .svg, and the intervals beside as ...-intervals"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> int:
        from eora_lab.experiment.checklist import SHOWS, gaps
        from eora_lab.experiment.paper_runs import both_sides, measured, rivalry, table_rows
        from eora_lab.experiment.store import ResultStore
        from eora_lab.experiment.sweep import expand, plan, sweep, tell_failures

        if not self.table:
            return self.checklist()
        check_figure(self.figure)
        rows = table_rows(self.table, self.model, self.scale, self.published, self.released)
        cells, code = expand([cell for row in rows for cell in row.cells.values()]), 0
        check_cells(cells)
        store = ResultStore(self.store)
        if self.dry_run:
            left = plan(cells, store, device=self.device)
            print(left)
            tell_failures(left.reasons)
        else:
            frame = sweep(cells, store, device=self.device)
            done = 0 if frame.empty else sum(frame["status"] == "done")
            code = 0 if done == len(cells) else CELLS_FAILED
        print(f"{self.table}: the paper's figures (its model) beside those measured here ({self.model}, {self.scale}):")
        print(measured(rows, store).to_string(index=False, na_rep=""))
        found = gaps(rows, store)
        if found["here"].notna().any():
            say_gaps(found)
            print(f"likely reason of the gaps: {SHOWS[self.table][1]}")
        if self.figure:
            from eora_lab.plots import plot_intervals, plot_table, save

            written = save(plot_table(both_sides(rows, store)), self.figure)
            if intervals := rivalry(rows, store):
                written += save(plot_intervals(intervals), self.figure.with_name(f"{self.figure.stem}-intervals"))
            print(*(f"wrote {path}" for path in written), sep="\n")
        return code

    def checklist(self) -> int:
        """Print all tables."""
        from eora_lab.experiment.checklist import GPU, checklist, spell

        print(
            f"The paper's tables, here at small scale ({self.model}). EoRA against its rivals: paired 95 % intervals."
        )
        for one in checklist(self.model, self.store, self.device):
            print(f"\n{one.table:4} {one.shows}: {one.verdict}")
            if one.cells:
                here = f"{one.done} of {one.cells} cells measured"
                here += f" in {spell(one.spent)}" if one.done else ""
                here += f", {spell(one.left)} to go, roughly" if one.left else ""
                full = f"; at full scale on one {GPU} about {spell(one.gpu_seconds)}" if one.gpu_seconds else ""
                full += f" and {one.gpu_memory / 1e9:.0f} GB (predicted)" if one.gpu_memory else ""
                print(f"     {here}{full}")
            if one.done or not one.cells:
                print(f"     {'likely reason of a gap' if one.done else 'not run here'}: {one.why}")
            print(f"     {one.command}")
        return 0


def say_gaps(found: "pandas.DataFrame") -> None:
    """Print differences, published and measured."""
    print("EoRA minus rival; here with the paired 95 % interval; log perplexity: below 0 EoRA is better, else above:")
    for pair in found.dropna(subset="here").itertuples():
        rank = f"{pair.base}, rank {pair.rank}{f', {pair.extra}' if pair.extra else ''}"
        printed = f"published {pair.published:+.4f}, " if pair.published == pair.published else ""
        gap = f", gap {pair.gap:+.4f}" if printed else ""
        here = f"here {pair.here:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}] {pair.verdict}"
        print(f"  {rank}, {pair.task}, against {pair.against}: {printed}{here}{gap}")
