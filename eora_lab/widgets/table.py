"""Frames of a result store as tables that a page's theme styles."""

from dataclasses import fields
from typing import TYPE_CHECKING

from eora_lab.experiment.cells import Cell
from eora_lab.run.recipe import Recipe

if TYPE_CHECKING:
    import pandas

SETTINGS = tuple(f.name for kind in (Recipe, Cell) for f in fields(kind) if f.name != "recipe")
ALWAYS = ("compressor", "method")  # shown even where they are the same in all cells
MEASURES = ("perplexity.", "tasks.", "bits_per_weight", "output_error.after")


def settings(frame: "pandas.DataFrame") -> list[str]:
    """Columns of settings that tell the cells apart."""
    known = [name for name in SETTINGS if name in frame]
    return [name for name in known if name in ALWAYS or frame[name].dropna().map(str).nunique() > 1]


def interesting(frame: "pandas.DataFrame") -> list[str]:
    """The settings that tell the cells apart, what was measured, and errors where there are any."""
    measures = [name for name in frame if name.startswith(MEASURES) and frame[name].map(is_number).any()]
    failed = ["error"] if "error" in frame and frame["error"].map(bool).any() else []
    return [*settings(frame), *measures, *failed]


def html_table(frame: "pandas.DataFrame", columns: list[str] | None = None) -> str:
    """An HTML table of some columns, escaped, that scrolls when it is wide."""
    shown = frame[columns if columns is not None else list(frame)]
    # a number that a cell does not have (the rank of a dense model) is blank; others lose no whole digits
    table = shown.map(
        lambda value: "" if value != value or value is None else f"{value:.5g}" if is_float(value) else value
    )
    style = "overflow: auto; max-height: 24em"
    return f"<div class='jp-RenderedHTMLCommon' style='{style}'>{table.to_html(index=False)}</div>"


def is_number(value: object) -> bool:
    """Whether a cell holds a number that is known."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def is_float(value: object) -> bool:
    """Whether a cell is to be rounded."""
    return isinstance(value, float)
