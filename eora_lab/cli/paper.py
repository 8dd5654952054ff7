"""`eora-lab paper`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Paper:
    """Run the rows of one of the paper's tables on a model, and print them beside the published figures.

    `--scale full` is the paper's setting and wants a GPU; `--scale small` runs the same rows on a small model with
    fewer samples (WikiText-2 perplexity, 200 questions of ARC-Easy, a quarter of the rank). Start it again to go on.
    """

    table: Annotated[str, tyro.conf.Positional]
    """T1, T2, T4 to T8, T10, T13 to T16, or T18"""
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
    """only say what is left to do"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        from eora_lab.paper_runs import measured, rivalry, table_rows
        from eora_lab.store import ResultStore
        from eora_lab.sweep import expand, plan, sweep

        rows = table_rows(self.table, self.model, self.scale, self.published, self.released)
        store, cells = ResultStore(self.store), expand([cell for row in rows for cell in row.cells.values()])
        if self.dry_run:
            print(plan(cells, store, device=self.device))
            return
        sweep(cells, store, device=self.device)
        print(f"{self.table}: the paper's figures (its model) beside those measured here ({self.model}, {self.scale}):")
        print(measured(rows, store).to_string(index=False, na_rep=""))
        print(
            "EoRA minus rival, paired 95 % intervals (log perplexity: negative is better; score: positive is better):"
        )
        for rival, task, interval in rivalry(rows, store):
            verdict = "" if interval.decided else "  undecided"
            print(f"{rival.base}, rank {rival.rank} {rival.method}: {task} {interval}{verdict}")
