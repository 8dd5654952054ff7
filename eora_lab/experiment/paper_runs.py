"""The paper's tables as experiments: the published rows, run on any model beside the published figures.

scale "full":  the paper's setting: one grid a channel, 64 sequences of 2048 tokens, all questions.
scale "small": the same rows on a small model: groups of 64, 32 sequences of 512 tokens, 200 questions, ranks divided
               by 4, WikiText-2 perplexity and ARC-Easy whatever the table measures. Its figures stand beside the
               published ones and mean something else.

As in the paper, the compressor is calibrated on WikiText-2 and the compensation on the task. Unlike there, statistics
come from the original model, so that all rows of a table share them.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from eora_lab.errors import EoraLabError, meant
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.paper import METHODS, TABLES, published
from eora_lab.experiment.store import MARGIN, ResultStore, row, scores
from eora_lab.run.intervals import Interval, Outcomes, paired

if TYPE_CHECKING:
    import pandas

BASES: dict[str, dict[str, Any]] = {
    "dense": {"compressor": "dense"},
    "GPTQ 4-bit": {"compressor": "gptq", "bits": 4},
    "GPTQ 3-bit": {"compressor": "gptq", "bits": 3},
    "GPTQ 2-bit": {"compressor": "gptq", "bits": 2},
    "GPTQ 4-bit g128": {"compressor": "gptq", "bits": 4, "group_size": 128},
    "GPTQ 3-bit g128": {"compressor": "gptq", "bits": 3, "group_size": 128},
    "SparseGPT 2:4": {"compressor": "sparsegpt", "sparsity": "2:4", "bits": 16},
    "SparseGPT 2:4 + GPTQ 4-bit": {"compressor": "sparsegpt", "sparsity": "2:4", "bits": 4},
    "Wanda 2:4": {"compressor": "wanda", "sparsity": "2:4", "bits": 16},
}
RUNNABLE = ("T1", "T2", "T4", "T5", "T6", "T7", "T8", "T10", "T13", "T14", "T15", "T16", "T18")

FULL: dict[str, dict[str, Any]] = {
    "common": {"group_size": -1, "seqlen": 2048, "nsamples": 64, "window_length": 2048, "windows": None},
    "wikitext2": {"source": "wikitext2", "perplexity": "wikitext2:test"},
    "arc_challenge": {"source": "arc+c4", "base_source": "wikitext2", "tasks": "arc_challenge"},
    "mathqa": {"source": "mathqa+c4", "base_source": "wikitext2", "tasks": "mathqa"},
    "gsm8k": {"source": "gsm8k+c4", "base_source": "wikitext2", "tasks": "gsm8k"},
    "mmlu": {"source": "mmlu+c4", "base_source": "wikitext2", "tasks": "mmlu"},
    "cnn_dailymail": {"source": "wikitext2", "tasks": "cnn_dailymail"},
}
SMALL: dict[str, dict[str, Any]] = {
    "common": {"group_size": 64, "seqlen": 512, "nsamples": 32, "window_length": 512, "windows": 20},
    "wikitext2": {"source": "wikitext2:validation", "perplexity": "wikitext2:test"},
    "arc_easy": {
        "source": "arc+wikitext2:validation",
        "base_source": "wikitext2:validation",
        "tasks": "arc_easy",
        "limit": 200,
    },
}
RANK_DIVISOR = 4
RANK_BEYOND = {"T10": 1024}  # the small scale goes one rank further than the published sweep
UNITS = {"wikitext2": "perplexity", "cnn_dailymail": "rougeLsum", "compensation": "minutes", "size": "GB"}
RELEASED: dict[str, dict[str, Any]] = {
    "method": {"act_s": "act_s_released"},
    "share": {"mathqa": 20 / 64, "arc_challenge": 30 / 64},
}


@dataclass(frozen=True)
class TableRow:
    """One row of a table: what it is, what the paper prints, and the cell that measures each column."""

    model: str  # the paper's
    base: str
    method: str  # the paper's name
    rank: int  # the paper's, or beyond it (then nothing is published)
    extra: str  # of tables with one column more, such as "nsamples 64"
    published: dict[str, float]
    cells: dict[str, Cell]


def table_rows(
    table: str, model: str, scale: str = "full", published_model: str = "", released: bool = False
) -> list[TableRow]:
    """The rows of a published table that this package can run, with their cells on `model`.

    published_model: whose rows; the table's first if empty.
    released: where the authors' code differs from their paper, do as the code: Act-S scales by mean |x|, and task mixes
        hold 20 of 64 sequences of MathQA, 30 of 64 of ARC.
    Raises EoraLabError when the table cannot be run or does not hold that model.
    """
    import pandas

    if table not in RUNNABLE:
        near = "" if table in TABLES else meant(f"T{table}", RUNNABLE)
        raise EoraLabError(
            f"{table} cannot be run here; these can: {', '.join(RUNNABLE)}{near}; "
            "`eora-lab paper` says why, table by table"
        )
    if scale not in ("full", "small"):
        raise EoraLabError(f"unknown scale {scale!r}; known: full, small")
    frame = published(table)
    chosen = published_model or frame["model"].iloc[0]
    if chosen not in set(frame["model"]):
        raise EoraLabError(f"{table} has no model {chosen!r}; it has {', '.join(frame['model'].unique())}")
    frame = frame[(frame["model"] == chosen) & frame["method"].isin(METHODS) & frame["base"].isin(BASES)]
    if scale == "small" and table in RANK_BEYOND:
        last = frame[frame["rank"] == frame["rank"].max()]
        frame = pandas.concat([frame, last.assign(rank=RANK_BEYOND[table], value=math.nan)])
    extra = next((name for name in ("nsamples", "factor_bits") if name in frame), None)
    settings = FULL if scale == "full" else SMALL
    columns = [task for task in settings if task != "common" and (scale == "small" or task in set(frame["task"]))]
    rows = []
    keys = ["base", "method", "rank", *([extra] if extra else [])]
    for values, group in frame.groupby(keys, sort=False, dropna=False):
        base, method, rank = values[:3]
        own: dict = {extra: int(values[3])} if extra and str(values[3]).isdigit() else {}
        cells = {task: _cell(model, base, method, int(rank), own, task, settings, released) for task in columns}
        about = " ".join(f"{name} {value}" for name, value in own.items())
        figures = group.dropna(subset="value").set_index("task")["value"].to_dict()
        rows.append(TableRow(chosen, base, method, int(rank), about, figures, cells))
    return rows


def _cell(model: str, base: str, method: str, rank: int, own: dict, task: str, settings: dict, released: bool) -> Cell:
    small = settings is SMALL
    solver = METHODS[method]
    config: dict[str, Any] = {"model": model, "inputs": "original", "perplexity": [], "method": solver}
    config |= settings["common"] | BASES[base] | settings[task] | own
    config["rank"] = rank // RANK_DIVISOR if small else rank
    if small and "group_size" in BASES[base]:
        config["group_size"] = settings["common"]["group_size"]
    if released:
        config["method"] = RELEASED["method"].get(solver, solver)
        config["share"] = RELEASED["share"].get(task, 0.5)
    return Cell.from_config(config)


def measured(rows: list[TableRow], store: ResultStore) -> "pandas.DataFrame":
    """Published and measured side by side: columns "paper ..." and "here ...", never one for both."""
    import pandas

    lines = []
    for one in rows:
        line: dict[str, Any] = {
            "base": one.base,
            "method": one.method,
            "": one.extra,
            "rank": one.rank if one.published else "",
        }
        line |= {f"paper {task}": value for task, value in one.published.items()}
        ranks = [cell.recipe.rank for cell in one.cells.values() if cell.recipe]
        line["here rank"] = ranks[0] if ranks else 0
        for task, cell in one.cells.items():
            line[f"here {task}"] = _figure(task, store.get(cell.config()))
        lines.append(line)
    return pandas.DataFrame(lines)


def _figure(task: str, found: dict | None) -> str:
    """A measured value with its standard error, in the paper's unit."""
    if found is None or found["status"] == "failed":
        return "not run" if found is None else "failed"
    value, low, high = _bounds(task, found)
    return f"{value:.2f}" if task == "wikitext2" else f"{value:.2f} ± {(high - low) / 2:.2f}"


def _bounds(task: str, found: dict) -> tuple[float, float, float]:
    """A measured value in the paper's unit, and one standard error below and above; of a perplexity, in its log."""
    cell = row(found)
    if task == "wikitext2":
        text = found["config"]["perplexity"][0]
        value, factor = cell[f"perplexity.{text}"], math.exp(cell.get(f"loss_stderr.{text}", 0.0))
        return value, value / factor, value * factor
    percent = 100 if cell[f"tasks.{task}.metric"] in ("acc", "exact_match") else 1
    value, error = percent * cell[f"tasks.{task}.value"], percent * (cell[f"tasks.{task}.stderr"] or 0)
    return value, value - error, value + error


def both_sides(rows: list[TableRow], store: ResultStore) -> "pandas.DataFrame":
    """Every published and every measured figure, one a row, as `eora_lab.plots.plot_table` draws them.

    Columns: source ("published" or "measured"), model, base, method (this package's name), rank, extra, task, unit,
    value, low, high (one standard error away; NaN where none is known).
    """
    import pandas

    lines = []
    for line in rows:
        about = {"base": line.base, "method": METHODS[line.method], "extra": line.extra}
        for task, value in line.published.items():
            side = {"source": "published", "model": line.model, "rank": line.rank}
            bounds = {"value": value, "low": math.nan, "high": math.nan}
            lines.append(side | about | {"task": task, "unit": UNITS.get(task, "accuracy, %")} | bounds)
        for task, cell in line.cells.items():
            found = store.get(cell.config())
            if found and found["status"] == "done":
                side = {"source": "measured", "model": cell.model, "rank": cell.recipe.rank if cell.recipe else 0}
                bounds = dict(zip(("value", "low", "high"), _bounds(task, found), strict=True))
                lines.append(side | about | {"task": task, "unit": UNITS.get(task, "accuracy, %")} | bounds)
    return pandas.DataFrame(lines)


def rivals(rows: list[TableRow]) -> Iterator[tuple[TableRow, TableRow]]:
    """Each row of EoRA with each row that it is to beat: a rival's on the same base and rank, and the base alone."""
    for eora in (one for one in rows if one.method == "EoRA"):
        for rival in rows:
            same = replace(rival, method="", published={}, cells={}) == replace(eora, method="", published={}, cells={})
            if rival.method != "EoRA" and (same or (rival.method == "none" and rival.base == eora.base)):
                yield eora, rival


def differences(eora: TableRow, rival: TableRow, task: str, store: ResultStore) -> dict[str, Interval]:
    """What was measured of a task -> EoRA minus the rival, paired. Empty where one of the two is not measured.

    Raises EoraLabError when they are not scores of the same windows or questions.
    """
    theirs, ours = (_scores(store.get(one.cells[task].config())) for one in (rival, eora))
    return {measure: paired(theirs[measure], ours[measure]) for measure in theirs if measure in ours}


def against(rival: TableRow) -> str:
    """The name of a rival in a sentence."""
    return rival.method if rival.method != "none" else "no compensation"


def rivalry(rows: list[TableRow], store: ResultStore) -> dict[str, dict[str, Interval]]:
    """EoRA minus each rival on the same base and rank, with paired intervals: what and its unit -> which pair -> it."""
    found: dict[str, dict[str, Interval]] = {}
    for eora, rival in rivals(rows):
        for task, cell in eora.cells.items():
            rank = f"rank {cell.recipe.rank}" if cell.recipe else ""
            pair = f"{', '.join(filter(None, (eora.base, rank, eora.extra)))}: against {against(rival)}"
            try:
                for measure, interval in differences(eora, rival, task, store).items():
                    found.setdefault(_difference(task, measure), {})[pair] = interval
            except EoraLabError as error:
                warnings.warn(f"{task}, {pair}: {error}", stacklevel=2)
    return found


def measured_name(task: str, measure: str) -> str:
    """What a difference is one of."""
    if task == "wikitext2":
        return "wikitext2 log perplexity"
    return f"{task} margin of the right answer" if measure.endswith(MARGIN) else f"{task} mean score of a question"


def _difference(task: str, measure: str) -> str:
    unit = ", nats a token" if task == "wikitext2" else ", nats" if measure.endswith(MARGIN) else ""
    side = "below" if task == "wikitext2" else "above"
    return f"{measured_name(task, measure)}{unit} ({side} 0: EoRA is better)"


def _scores(found: dict | None) -> dict[str, Outcomes]:
    """Of what a cell of a table measures: of a task first its metric, then margins."""
    return scores(found) if found else {}
