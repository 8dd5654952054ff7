"""Figures, one kind a file: from frames to a matplotlib Figure, which `save` writes. No mathematics here."""

from eora_lab.plots.comparison import plot_comparison
from eora_lab.plots.curves import plot_setting
from eora_lab.plots.front import plot_front
from eora_lab.plots.inside import plot_blocks, plot_heads, plot_layers
from eora_lab.plots.intervals import plot_intervals
from eora_lab.plots.looks import looks, method_name
from eora_lab.plots.output import save, use_style
from eora_lab.plots.spectra import plot_budget, plot_error_map, plot_losses, plot_ranks, plot_spectra, rank_grid
from eora_lab.plots.spend import plot_spend
from eora_lab.plots.surprise import surprise_html
from eora_lab.plots.sweeps import plot_sweep
from eora_lab.plots.table import plot_table
from eora_lab.plots.words import alt_text, tell

__all__ = [
    "alt_text",
    "looks",
    "method_name",
    "plot_blocks",
    "plot_budget",
    "plot_comparison",
    "plot_error_map",
    "plot_front",
    "plot_heads",
    "plot_intervals",
    "plot_layers",
    "plot_losses",
    "plot_ranks",
    "plot_setting",
    "plot_spectra",
    "plot_spend",
    "plot_sweep",
    "plot_table",
    "rank_grid",
    "save",
    "surprise_html",
    "tell",
    "use_style",
]
