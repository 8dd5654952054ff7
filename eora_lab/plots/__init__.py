"""Figures, one kind a file: from frames to a matplotlib Figure, which `save` writes. No mathematics here."""

from eora_lab.plots.comparison import plot_comparison
from eora_lab.plots.curves import plot_setting
from eora_lab.plots.front import plot_front, plot_sweep
from eora_lab.plots.intervals import plot_intervals
from eora_lab.plots.spectra import plot_budget, plot_error_map, plot_ranks, plot_spectra, rank_grid
from eora_lab.plots.style import method_name, save, use_style
from eora_lab.plots.table import plot_table

__all__ = [
    "method_name",
    "plot_budget",
    "plot_comparison",
    "plot_error_map",
    "plot_front",
    "plot_intervals",
    "plot_ranks",
    "plot_setting",
    "plot_spectra",
    "plot_sweep",
    "plot_table",
    "rank_grid",
    "save",
    "use_style",
]
