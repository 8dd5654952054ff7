"""What a board shows of a result store, as JSON values: cells with plain names, intervals of all pairs, layers, cost.

Everything is computed here; `view/` draws it, wherever that is.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from eora_lab.board.report import question, told_cost
from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import DENSE, Cell
from eora_lab.experiment.running import running
from eora_lab.experiment.store import ResultStore, row, scores
from eora_lab.plots import alt_text, looks, method_name
from eora_lab.plots.findings import SETTINGS, cell_names, finding, varied
from eora_lab.plots.output import svg
from eora_lab.plots.scales import AXES, ERRORS, PERCENT, figures, metric_name, metrics, value_name
from eora_lab.plots.sweeps import plot_sweep
from eora_lab.run.intervals import Outcomes, all_pairs

if TYPE_CHECKING:
    import pandas

ALWAYS = ("compressor", "bits", "method", "rank")  # settings that are shown even where all cells have the same
COSTS = {"cost.total": ("seconds", 1.0), "cost.peak_memory": ("memory, GB", 1e-9), "nbytes": ("MB of the layers", 1e-6)}
MANY = 200  # cells; of more, intervals are against the baseline alone
DIGITS = 4  # of the errors of layers


def board(
    store: ResultStore,
    cells: Sequence[Cell] | None = None,
    figure: bool = False,
    go_on: Iterable[tuple[str, str]] = (),
) -> dict:
    """All that a board shows, as JSON values.

    cells:  of a grid, in its order: those that the store does not have are shown, too. None: all that the store has.
    figure: with the figure of the grid's results, which takes a second.
    go_on:  (why, command) of what can be done next.
    """
    found = _found(store, cells)
    frame = _frame(found)
    compressed = frame[frame["compressor"] != DENSE] if len(frame) else frame
    done = frame[frame["status"] == "done"].reset_index(drop=True) if len(frame) else frame
    measured = _measures(done)
    judging = [column["key"] for column in measured if column["judges"]]
    settings = [name for name in SETTINGS if name in frame and (name in ALWAYS or name in varied(frame))]
    names = _names(frame)
    shown = [_cell(one, name, settings) for one, name in zip(found, names, strict=True)]
    for column in measured:
        values = dict(zip(done["id"], zip(*figures(done, column["key"]), strict=True), strict=True))
        for one in shown:
            if one["id"] in values:
                value, low, high = (_number(x * column["factor"]) for x in values[one["id"]])
                one["values"][column["key"]], one["spread"][column["key"]] = value, [low, high]
    data: dict[str, Any] = {
        "title": store.folder.resolve().name,
        "question": question(frame, [column["name"] for column in measured if column["judges"]]),
        "columns": [{"key": name, "name": AXES.get(name, name.replace("_", " ")), "axis": True} for name in settings]
        + measured,
        "cells": shown,
        "looks": {
            method: {"colour": look.colour, "marker": look.marker, "name": method_name(method)}
            for method, look in looks(list(dict.fromkeys(compressed["method"].dropna()))).items()
        }
        if len(compressed)
        else {},
        "baseline": _baseline(shown),
        "running": now(store),
        "failures": Counter(one["error"] for one in shown if one["error"]).most_common(),
        "findings": [finding(done, key) for key in judging if _any_compressed(done, key)],
        "cost": told_cost(found),
        "figures": _figure(frame) if figure else [],
        "goOn": [[why, command] for why, command in go_on],
    }
    return data | {"intervals": _intervals(found, data["baseline"])} | _layers(found)


def _found(store: ResultStore, cells: Sequence[Cell] | None) -> list[dict]:
    """Cells of the store, or of a grid whether they are in the store or not, each with its id."""
    if cells is None:
        kept = sorted(store.cells(), key=lambda one: _order(one["config"]))
    else:
        empty: dict[str, Any] = {"status": "waiting", "result": None, "error": "", "cost": {}, "environment": {}}
        kept = [store.get(cell.config()) or empty | {"config": cell.config()} for cell in cells]
    return [one | {"id": store.path(one["config"]).stem} for one in kept]


def _order(config: dict) -> tuple:
    """Sorts cells as a grid would have them: the dense model, then every base, alone and with its paths."""
    names = ("model", "grid", "compressor", "bits", "group_size", "sparsity", "method", "rank")
    values = [config.get(name) for name in names]
    plain = [(0, float(x), "") if isinstance(x, int | float) else (1, 0.0, str(x)) for x in values]
    return (config.get("compressor") != DENSE, *plain[:6], config.get("method") != "none", *plain[6:], str(config))


def _frame(found: list[dict]) -> "pandas.DataFrame":
    import pandas

    frame = pandas.DataFrame([row(one) | {"id": one["id"]} for one in found])
    for name in ("compressor", "method", "status"):  # a store may hold nothing, or dense models alone
        if name not in frame:
            frame[name] = None
    return frame


def _names(frame: "pandas.DataFrame") -> list[str]:
    """What tells every cell from the others."""
    if not len(frame):
        return []
    dense = frame["compressor"] == DENSE
    models = frame["model"].nunique() > 1
    rest = iter(cell_names(frame[~dense]))
    names = [
        (f"{DENSE}, {model}" if models else DENSE) if one else next(rest)
        for one, model in zip(dense, frame["model"], strict=True)
    ]
    again = [names[:i].count(name) for i, name in enumerate(names)]  # such as on other windows of the same text
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, again, strict=True)]


def _measures(done: "pandas.DataFrame") -> list[dict]:
    """The columns that hold what was measured, judging ones first: good is the direction that is better."""
    found: list[dict[str, Any]] = []
    keys = metrics(done) if len(done) else []
    for key in keys:
        found.append({"key": key, "judges": True, "good": "higher" if key.startswith("tasks.") else "lower"})
    more = [f"{name}.{when}" for name in ERRORS for when in ("after", "before")] + ["bits_per_weight", *COSTS]
    found += [{"key": key, "judges": False, "good": "lower"} for key in more if key in done and key not in keys]
    for column in found:
        name, factor = COSTS.get(column["key"], ("", 1.0))
        kind = column["key"].partition(".")[0]
        if kind in ERRORS:
            name = ERRORS[kind] + (", before" if column["key"].endswith("before") else "")
        name = name or AXES.get(column["key"]) or " ".join(metric_name(done, column["key"]).split("(")[0].split())
        column |= {"name": name.rstrip(","), "factor": factor, "axis": False}
        column["hidden"] = column["key"].endswith(".before") or column["key"] in ("nbytes", "cost.peak_memory")
    return found


def _any_compressed(done: "pandas.DataFrame", key: str) -> bool:
    return bool((done["compressor"] != DENSE).mul(done[key].notna()).any())


def now(store: ResultStore) -> list[dict]:
    """What runs in a store at this moment, by any process."""
    found = []
    for one in running(store):
        share = one.step.done / one.step.total if one.step.total else None
        key, doing = store.path(one.cell.config()).stem, str(one.step)
        told = {"id": key, "name": describe(one.cell), "doing": doing, "share": share}
        found.append({**told, "began": one.began, "heard": one.heard})
    return found


def describe(cell: Cell) -> str:
    """A cell in a few words, without others to tell it from."""
    if cell.recipe is None:
        return DENSE
    rank = f" rank {cell.recipe.rank}" if cell.recipe.rank else ""
    return f"{cell.recipe.base}, {method_name(cell.recipe.method)}{rank}"


def _cell(found: dict, name: str, settings: list[str]) -> dict:
    """One cell: its values by column, and all of its settings, versions and cost as text."""
    config = row(found)
    values = {key: _value(key, config.get(key)) for key in settings}
    result = {key: value for key, value in (found["result"] or {}).items() if not isinstance(value, list)}
    more = {"result": result, "settings": found["config"], "cost": found["cost"], "environment": found["environment"]}
    return {
        "id": found["id"],
        "name": name,
        "method": config.get("method") if config.get("compressor") != DENSE else DENSE,
        "status": found["status"],
        "error": found["error"],
        "values": values,
        "spread": {},
        "more": {key: json.dumps(value, indent=1) for key, value in more.items() if value},
    }


def _value(key: str, value: object) -> object:
    """A setting as a table shows it: a number where it is one, else its word."""
    if value is None or value != value:
        return None
    if key == "method":
        return method_name(str(value))
    said = value_name(key, value)
    if isinstance(value, int | float) and not isinstance(value, bool) and said == f"{value:g}":
        return value
    return said


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _baseline(shown: list[dict]) -> str | None:
    """What others are compared with at first: the first compressed cell that is done, else the first."""
    done = [one for one in shown if one["status"] == "done"]
    return next((one["id"] for one in done if one["method"] != DENSE), next((one["id"] for one in done), None))


def _intervals(found: list[dict], baseline: str | None) -> list[dict]:
    """Paired intervals of every measure: what cell j has more than cell i, as [i, j, mean, low, high]."""
    measured = [scores(one) if one["status"] == "done" else {} for one in found]
    nothing, tables = Outcomes(None, ()), []
    for name in dict.fromkeys(name for one in measured for name in one):
        outcomes = [one.get(name, nothing) for one in measured]
        if len(found) > MANY:
            base = next(i for i, one in enumerate(found) if one["id"] == baseline)
            alone = {i: all_pairs([outcomes[base], one]) for i, one in enumerate(outcomes) if i != base}
            pairs = {(base, i): one[0, 1] for i, one in alone.items() if one}
        else:
            pairs = all_pairs(outcomes)
        percent = 100.0 if name.split()[-1] in PERCENT else 1.0
        table = [[i, j, *(percent * x for x in (one.difference, one.low, one.high))] for (i, j), one in pairs.items()]
        if table:
            n = next(iter(pairs.values())).n
            lower = name.startswith("log perplexity")
            unit = "nats a token" if lower else "percentage points" if percent == 100.0 else ""
            what = f"{name}, {unit}" if unit else name
            tables.append({"name": what, "good": "lower" if lower else "higher", "n": n, "pairs": table})
    return tables


def _layers(found: list[dict]) -> dict:
    """Errors and ranks of layers; cells with the same layers share their names."""
    names: list[list[str]] = []
    layers = {}
    for one in found:
        if kept := (one["result"] or {}).get("layers"):
            of, rank, before, after = zip(*kept, strict=True)
            if list(of) not in names:
                names.append(list(of))
            short = [[float(f"{x:.{DIGITS}g}") for x in column] for column in (before, after)]
            layers[one["id"]] = {"of": names.index(list(of)), "rank": rank, "before": short[0], "after": short[1]}
    return {"layerNames": names, "layers": layers}


def _figure(frame: "pandas.DataFrame") -> list[dict]:
    """The grid's results as the figure that suits them, if there is anything to draw."""
    try:
        drawn = plot_sweep(frame)
    except EoraLabError:
        return []
    return [{"alt": alt_text(drawn), "svg": svg(drawn)}]
