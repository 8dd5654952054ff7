"""What a frame of results says: which settings it varies, what tells a cell from the others, and which cell is best."""

import numpy as np
import pandas

from eora_lab.experiment.cells import DENSE, LATER, Cell
from eora_lab.plots.looks import method_name
from eora_lab.plots.scales import figures, metric_name, setting_name
from eora_lab.plots.words import number

MEASURING = ("perplexity", "windows", "window_length")
SETTINGS = tuple(name for name in (*Cell().config(), *LATER) if name not in MEASURING)
OF_THE_PATH = ("rank", "factor_bits", "shared_factors", "refit", "shrink", "rank_only")  # a base alone has none of it
OF_THE_BASE = ("model", "compressor", "bits", "grid", "group_size", "sparsity")


def touched(frame: pandas.DataFrame, setting: str) -> pandas.Series:
    """Which rows depend on a setting: the dense model on none, a base alone on none of the low-rank path."""
    compressed = frame["compressor"] != DENSE
    return compressed & (frame["method"] != "none") if setting in OF_THE_PATH else compressed


def varied(frame: pandas.DataFrame) -> list[str]:
    """The settings that differ among the rows that depend on them."""
    return [name for name in SETTINGS if name in frame and frame.loc[touched(frame, name), name].map(str).nunique() > 1]


def cell_names(frame: pandas.DataFrame) -> list[str]:
    """What tells each cell from the others."""
    named = [name for name in varied(frame) if name != "method"]
    parts = {name: touched(frame, name).to_numpy() for name in named}
    methods = [method_name(method) for method in frame["method"]]
    return [
        ", ".join([methods[i], *(setting_name(name, frame[name].iloc[i]) for name in named if parts[name][i])])
        for i in range(len(frame))
    ]


def finding(frame: pandas.DataFrame, metric: str) -> str:
    """Which finished cell is best in a metric, beside its base alone and the dense model where these are known."""
    frame = frame.dropna(subset=metric).reset_index(drop=True)
    cells = frame[frame["compressor"] != DENSE].reset_index(drop=True)
    value = figures(cells, metric)[0]
    i = int(np.argmax(value) if metric.startswith("tasks.") else np.argmin(value))
    unit = " %" if "%" in metric_name(frame, metric) else ""
    what = metric_name(frame, metric).split("\n")[0].rstrip(",")
    text = f"{cell_names(cells)[i]} is best of {len(cells)}: {what} {number(value[i])}{unit}"
    base = [name for name in OF_THE_BASE if name in cells]
    alone = cells[(cells["method"] == "none") & (cells[base].map(str) == cells.loc[i, base].map(str)).all(axis=1)]
    dense = frame[(frame["compressor"] == DENSE) & (frame["model"] == cells.loc[i, "model"])]
    beside = [(alone, "without compensation")] if cells.loc[i, "method"] != "none" else []
    beside += [(dense, "dense")]
    said = [f"{number(figures(rows, metric)[0][0])} {name}" for rows, name in beside if len(rows)]
    return f"{text}; {', '.join(said)}" if said else text
