"""A metric against a setting, a line a method: rank curves and all other ablations."""

import math

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import DENSE
from eora_lab.plots.findings import finding, touched, varied
from eora_lab.plots.labels import End, label_ends
from eora_lab.plots.looks import INK, LOOKS, Look, looks, method_name
from eora_lab.plots.scales import (
    AXES,
    ERRORS,
    figures,
    metric_name,
    metrics,
    plain_log_axis,
    setting_name,
    spread_metric,
    value_name,
)
from eora_lab.plots.style import BAND, WIDTH, panels, styled
from eora_lab.plots.words import read_out, tell

HEIGHT = 3.0  # inches of a panel
LEGEND = 0.3  # inches of a line of a legend below the panels
APART = 0.12  # methods on a categorical axis


def plot_setting(frame: pandas.DataFrame, setting: str, only: list[str] | None = None) -> Figure:
    """Every metric of a result store's rows against one setting, with bands of one standard error where it is known.

    frame:   of `ResultStore.frame` or `sweep`; failed cells are left out.
    setting: a column: a numeric axis for positive numbers, else one place a value.
    only:    the metrics to draw, such as ["perplexity.pydoc:heldout"]; all if not given.
    A line is a method, or else the first other setting that differs; what differs besides gets a panel a value. Models
    that do not depend on the setting (dense; the base alone, which has no rank) are lines across.
    Raises EoraLabError when no finished cell has that setting and a metric.
    """
    frame = frame[frame["status"] == "done"].reset_index(drop=True)
    wanted = metrics(frame) if only is None else only
    if setting not in frame or not frame.loc[touched(frame, setting), setting].notna().any() or not wanted:
        raise EoraLabError(f"nothing to draw against {setting}: no finished cell has it and a metric")
    others = [name for name in varied(frame) if name != setting]
    key = "method" if "method" in others or not others else others[0]
    facets = _facets(frame, [name for name in others if name != key])
    look, places = looks(_values(frame, key)), _places(frame, setting)
    width = max(WIDTH, 0 if numeric(places) else len(facets) * _width(_names(setting, places)))
    with styled():
        shared = "all" if all(metric.partition(".")[0] in ERRORS for metric in wanted) else "row"
        figure, grid = panels(len(wanted), len(facets), HEIGHT, width, sharey=shared)
        for metric, line in zip(wanted, grid, strict=True):
            for (title, part), axes in zip(facets, line, strict=True):
                _lines_across(axes, part[~touched(part, setting)].dropna(subset=metric), metric)
                rows = part[touched(part, setting)].dropna(subset=metric)
                for i, (series, one) in enumerate(look.items()):
                    name = method_name(series) if key == "method" else setting_name(key, series)
                    own = rows[rows[key] == series]
                    if own.empty:
                        continue
                    x = own[setting].map(places)
                    if numeric(places):
                        _curve(axes, own, x, metric, one, name)
                    else:
                        _points(axes, own, x + APART * (i - (len(look) - 1) / 2), metric, one, name)
                _setting_axis(axes, setting, places)
                axes.set_title(title)
                axes.set_ylabel(metric_name(frame, metric) if axes is line[0] else "")
            spread_metric(line[0], metric, figures(frame, metric)[0])
        _name_series(figure, grid)
    said = [_read(frame[touched(frame, setting)], setting, key, metric) for metric in wanted]
    return tell(figure, finding(frame, wanted[0]), ". ".join(said) + ".", _common(frame))


def _values(frame: pandas.DataFrame, setting: str) -> list:
    """The values of a setting, in the order of the rows that depend on it."""
    return list(dict.fromkeys(frame.loc[touched(frame, setting), setting].dropna()))


def _facets(frame: pandas.DataFrame, split: list[str]) -> list[tuple[str, pandas.DataFrame]]:
    """(title, rows) of every panel. Rows that do not depend on a setting are in all of its panels."""
    facets: list[tuple[list[str], pandas.DataFrame]] = [([], frame)]
    for name in split:
        free = ~touched(frame, name)
        facets = [
            ([*titles, setting_name(name, value)], part[(part[name] == value) | free.loc[part.index]])
            for titles, part in facets
            for value in _values(frame, name)
        ]
    return [(", ".join(titles), part) for titles, part in facets]


def _places(frame: pandas.DataFrame, setting: str) -> dict[object, float]:
    """Where each value of the setting stands on the axis: at itself, or at 0, 1, ..."""
    values = _values(frame, setting)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if min(values) > 0 and len(values) > 1:
            return {value: float(value) for value in sorted(values)}
        values.sort(key=lambda value: (value < 0, value))  # -1 stands for all
    return {value: float(i) for i, value in enumerate(values)}


def _names(setting: str, places: dict[object, float]) -> list[str]:
    """What stands at the ticks, with line breaks in mixes and regular expressions."""
    return [value_name(setting, value).replace("+", "+\n").replace("|", "|\n") for value in places]


def _width(names: list[str]) -> float:
    """Inches that names need side by side."""
    longest = max(len(line) for name in names for line in name.split("\n"))
    return len(names) * max(0.8, 0.2 + 0.08 * longest)


def numeric(places: dict[object, float]) -> bool:
    """Whether values stand at themselves."""
    return all(value == place for value, place in places.items())


def _lines_across(axes: Axes, rows: pandas.DataFrame, metric: str) -> None:
    for compressor, value in zip(rows["compressor"], figures(rows, metric)[0], strict=True):
        colour, line, name = LOOKS["none"].colour, LOOKS["none"].line, method_name("none")
        if compressor == DENSE:
            colour, line, name = INK, "--", "dense"
        axes.axhline(value, color=colour, linestyle=line, label=name)


def _curve(axes: Axes, rows: pandas.DataFrame, places: pandas.Series, metric: str, look: Look, name: str) -> None:
    order = np.argsort(places.to_numpy(), kind="stable")
    x, (value, low, high) = places.to_numpy()[order], (column[order] for column in figures(rows, metric))
    axes.plot(x, value, color=look.colour, marker=look.marker, linestyle=look.line, label=name)
    if np.isfinite(low).any():
        axes.fill_between(x, low, high, color=look.colour, alpha=BAND, linewidth=0)


def _points(axes: Axes, rows: pandas.DataFrame, x: pandas.Series, metric: str, look: Look, name: str) -> None:
    value, low, high = figures(rows, metric)
    errors = np.array([value - low, high - value]) if np.isfinite(low).any() else None
    axes.errorbar(x, value, errors, fmt=look.marker, color=look.colour, linewidth=1.2, label=name)


def _setting_axis(axes: Axes, setting: str, places: dict[object, float]) -> None:
    points, names = list(places.values()), _names(setting, places)
    axes.set_xlabel(AXES.get(setting, setting.replace("_", " ")))
    if not numeric(places):
        axes.set_xticks(points, names)
        axes.set_xlim(-0.4, len(points) - 0.6)
    elif max(points) >= 4 * min(points):
        plain_log_axis(axes, "x", points, base=2)
    else:
        axes.set_xticks(points, names)


def _name_series(figure: Figure, grid: list[list[Axes]]) -> None:
    """Every series once: at the ends of its lines where the last panel of a row has all of them, else in a legend."""
    found = [[axes.get_legend_handles_labels() for axes in line] for line in grid]
    names = {name for line in found for _, labels in line for name in labels}
    if all(set(line[-1][1]) == names and all(hasattr(one, "get_xdata") for one in line[-1][0]) for line in found):
        for axes, line in zip(grid, found, strict=True):
            label_ends(axes[-1], _ends(axes[-1], *line[-1]), HEIGHT)
        return
    series = {name: handle for line in found for pair in line for handle, name in zip(*pair, strict=True)}
    figure.set_figheight(figure.get_figheight() + LEGEND * math.ceil(len(series) / 4))
    figure.legend(list(series.values()), list(series), loc="outside lower left", ncols=4)


def _ends(axes: Axes, handles: list, names: list[str]) -> list[End]:
    """Where lines end on the right: those across the panel at its edge."""
    edge = axes.get_xlim()[1]
    across = [handle.get_transform() != axes.transData for handle in handles]
    x = [edge if whole else handle.get_xdata()[-1] for handle, whole in zip(handles, across, strict=True)]
    seen = dict(zip(names, zip(x, handles, strict=True), strict=True))  # a line for a model in each of several panels
    return [End(x, line.get_ydata()[-1], name, line.get_color()) for name, (x, line) in seen.items()]


def _common(frame: pandas.DataFrame) -> str:
    """What all compressed cells have in common."""
    cells = frame[frame["compressor"] != DENSE]
    common = {name: cells[name].iloc[0] for name in ("model", "compressor", "bits") if cells[name].nunique() == 1}
    return ", ".join(setting_name(name, value) for name, value in common.items())


def _read(frame: pandas.DataFrame, setting: str, key: str, metric: str) -> str:
    """A metric against the setting in words, a series after the other."""
    rows, parts = frame.dropna(subset=metric), []
    for series, one in rows.groupby(key, sort=False):
        name = method_name(series) if key == "method" else setting_name(key, series)
        x = [value_name(setting, value) for value in one[setting]]
        parts.append(f"{name} {read_out(x, figures(one, metric)[0].tolist())}")
    what = " ".join(metric_name(frame, metric).split())
    return f"{what}, against {AXES.get(setting, setting.replace('_', ' '))}: {'; '.join(parts)}"
