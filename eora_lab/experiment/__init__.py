"""Many runs: cells, grids, what they share, where results are kept, and the paper's tables."""

from eora_lab.environment import environment
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.compare import ComparisonRow, compare
from eora_lab.experiment.estimate import SLOWER, memory, work
from eora_lab.experiment.paper import MEASURED, published
from eora_lab.experiment.paper_runs import both_sides, measured, rivalry, table_rows
from eora_lab.experiment.store import ResultStore, row, scores
from eora_lab.experiment.sweep import expand, named_grids, plan, read_grid, rows, run_plan, sweep
from eora_lab.run.intervals import Interval, Outcomes, paired, paired_bootstrap

__all__ = [
    "MEASURED",
    "SLOWER",
    "Cell",
    "ComparisonRow",
    "Interval",
    "Outcomes",
    "ResultStore",
    "both_sides",
    "compare",
    "environment",
    "expand",
    "measured",
    "memory",
    "named_grids",
    "paired",
    "paired_bootstrap",
    "plan",
    "published",
    "read_grid",
    "rivalry",
    "row",
    "rows",
    "run_plan",
    "scores",
    "sweep",
    "table_rows",
    "work",
]
