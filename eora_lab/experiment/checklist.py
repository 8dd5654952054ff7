"""The paper as a checklist: what each table shows, what of it is measured here, how far apart, and what a run costs."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.estimate import SLOWER, memory, seconds, work
from eora_lab.experiment.paper import MEASURED, TABLES, published
from eora_lab.experiment.paper_runs import (
    RUNNABLE,
    UNITS,
    TableRow,
    against,
    differences,
    measured_name,
    rivals,
    table_rows,
)
from eora_lab.experiment.store import MARGIN, ResultStore
from eora_lab.experiment.sweep import expand

if TYPE_CHECKING:
    import pandas

GPU, GPU_FLOPS = "H200", 40e12  # float32 operations a second that are assumed: 60 % of what it can
STANDS_FOR = {"arc_easy": "arc_challenge"}  # measured at small scale -> published

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {  # of the models that the paper compressed
    "LLaMA3-8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3.2-3B": LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}

SMALLER = (
    "another model: 135 million weights in groups of 64 lose more at the same bits, so that there is more to give back"
)
ACT_S = (
    "against Act-S at 3 bits the sign differs, although EoRA leaves less output error there, and with 4 times the "
    "calibration text too: with so much broken, the output error of a layer is no longer the loss of the model"
)
SPARSE = "as in the paper the lead grows with rank, until so much rank makes all methods alike"
SHOWS: dict[str, tuple[str, str]] = {  # table -> what it shows, and why it is another number here or none
    "T1": ("2:4 by SparseGPT", SMALLER),
    "T2": ("GPTQ in 4 and 3 bits", f"{SMALLER}; {ACT_S}"),
    "T3": ("fine-tuning from EoRA", "trained for hours; the command compares the same starts on a run of yours"),
    "T4": ("2:4 by SparseGPT, more models", SMALLER),
    "T5": ("GPTQ in 4 and 3 bits, more models", f"{SMALLER}; {ACT_S}"),
    "T6": ("2:4 and 4 bits at once", SMALLER),
    "T7": ("2:4 by Wanda", SMALLER),
    "T8": ("how many calibration sequences", "EoRA alone at several sizes: it has no rival to be measured against"),
    "T9": ("tokens a second", "a GPU's kernels: no timing of one is recorded yet"),
    "T10": ("rank, on 2:4", f"{SMALLER}; {SPARSE}"),
    "T11": ("fine-tuning from EoRA, more figures", "trained for hours, as T3"),
    "T12": ("fine-tuning with less data", "trained for hours, as T3; --nsamples takes a share of the data"),
    "T13": ("factors in 4 and 3 bits", SMALLER),
    "T14": ("summaries, by ROUGE", "T2's stand-ins: a model of 135 million weights writes none that can be scored"),
    "T15": ("MMLU", "T2's stand-ins: a model of 135 million weights guesses; the paper's own base is at chance, too"),
    "T16": ("GPTQ in groups of 128", f"at small scale all grids have groups of 64, so that it is T2; {ACT_S}"),
    "T17": ("error layer by layer", "printed by every run: the command's table has a line a layer"),
    "T18": ("more rivals", f"{SMALLER}; of its rivals those with a closed form are here"),
    "T19": ("2 bits, and RILQ", "RILQ is trained, and not here; a base in 2 bits is"),
}
OTHER_COMMANDS = {
    "T3": "eora-lab finetune RUN OUT --init eora svd lora",
    "T9": "python -m kernels.bench",
    "T11": "eora-lab finetune RUN OUT --init eora svd lora",
    "T12": "eora-lab finetune RUN OUT --init eora svd lora --nsamples 400",
    "T17": "eora-lab compress runs/T17 --inputs original",
    "T19": "eora-lab compress runs/T19 --bits 2",
}


@dataclass(frozen=True)
class Entry:
    """One table of the paper.

    rows, gaps: as they are measured at small scale; none where this package cannot run the table.
    cells, done: how many a run at small scale has, and how many of them are measured.
    spent:      seconds that those took.
    left:       seconds that the others will take, roughly, at the pace of what is measured; None where nothing is left.
    gpu_seconds, gpu_memory: predicted for the paper's setting on one `GPU`, in float32, bytes; None where it is not
                known.
    """

    table: str
    shows: str
    why: str
    command: str
    rows: list[TableRow]
    store: ResultStore | None
    gaps: "pandas.DataFrame"
    cells: int
    done: int
    spent: float
    left: float | None
    gpu_seconds: float | None
    gpu_memory: int | None

    @property
    def verdict(self) -> str:
        """How many of the paper's comparisons EoRA wins here."""
        measured = self.gaps.dropna(subset="here") if len(self.gaps) else self.gaps
        if not len(measured):
            return "not measured"
        counts = measured["verdict"].value_counts()
        said = [f"{counts[word]} {word}" for word in ("better", "undecided", "worse") if word in counts]
        return f"{', '.join(said)} of {len(measured)}"


def checklist(model: str = "smollm2-135m", folder: Path | None = None, device: str = "cpu") -> list[Entry]:
    """All tables of the paper, at small scale on a model.

    folder: a result store; those recorded in the repository count too, and per table the fuller one of both.
    Raises EoraLabError where the published figures are not here (see `published`).
    """
    places = [one for one in (folder, MEASURED / "paper") if one and one.is_dir()]
    return [entry(table, model, [ResultStore(one) for one in places], device) for table in TABLES]


def entry(table: str, model: str, stores: Sequence[ResultStore], device: str = "cpu") -> Entry:
    """One table: see `checklist`."""
    shows, why = SHOWS[table]
    if table not in RUNNABLE:
        command = OTHER_COMMANDS[table]
        return Entry(table, shows, why, command, [], None, gaps([], None), 0, 0, 0.0, None, None, None)
    rows = table_rows(table, model, "small")
    cells = _cells(rows)
    known = {one: [found for cell in cells if (found := one.get(cell.config()))] for one in stores}
    store = max(known, key=lambda one: len(known[one]), default=None)
    done = [cell["config"] for cell in known[store]] if store else []
    todo = [cell for cell in cells if cell.config() not in done]
    left = to_go(todo, store, device) if todo else None
    spent = sum((found["cost"].get("total", 0.0) for found in known[store]), 0.0) if store else 0.0
    time, peak = on_gpu(table)
    command = f"eora-lab paper {table} --scale small"
    return Entry(
        table, shows, why, command, rows, store, gaps(rows, store), len(cells), len(done), spent, left, time, peak
    )


def to_go(cells: list[Cell], store: ResultStore | None, device: str) -> float | None:
    """Seconds that cells will take: at the pace of those that a store has of the same model, else of this machine."""
    known = [found for found in store.cells() if found["status"] == "done"] if store else []
    known = [found for found in known if found["config"]["model"] == cells[0].model and "total" in found["cost"]]
    operations = work(cells)
    if not known or not operations:
        return seconds(cells, [], device)[0]
    done = work([Cell.from_config(found["config"]) for found in known])
    return operations * sum(found["cost"]["total"] for found in known) / done if done else None


def _cells(rows: list[TableRow]) -> list[Cell]:
    return expand([cell for row in rows for cell in row.cells.values()])


@cache
def on_gpu(table: str) -> tuple[float | None, int | None]:
    """(seconds, bytes) that a table in the paper's setting takes on one GPU, from shapes alone: a prediction."""
    name = published(table)["model"].iloc[0]
    if name not in SHAPES:
        return None, None
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**SHAPES[name]).save_pretrained(folder)
        cells = _cells(table_rows(table, folder))
        needs = [need for cell in cells if (need := memory(cell)) is not None]
        operations = work(cells)
    return (SLOWER * operations / GPU_FLOPS if operations else None), max(needs, default=None)


def gaps(rows: list[TableRow], store: ResultStore | None) -> "pandas.DataFrame":
    """EoRA minus each rival, published and here: base, rank and extra as published, task, against, published, here,
    low, high (of the paired 95 % interval), gap (here minus published), verdict (better, worse or undecided).

    Perplexities differ by their logarithms, nats a token; the rest by the mean score of a question (1: all right), or
    by its margin (nats), of which nothing is published. A task that stands for another one has its published figures.
    """
    import pandas

    lines = []
    for eora, rival in rivals(rows):
        pair = {"base": eora.base, "rank": eora.rank, "extra": eora.extra, "against": against(rival)}
        for task in dict.fromkeys([*eora.cells, *eora.published]):
            printed = published_difference(eora, rival, task)
            found = {}
            if store and task in eora.cells and task in rival.cells:
                try:
                    found = differences(eora, rival, task, store)
                except EoraLabError:  # not the same questions: no comparison
                    found = {}
            if not found and not math.isnan(printed) and task not in STANDS_FOR:
                lines.append(pair | {"task": task, "published": printed})
            for measure, one in found.items():
                margin = measure.endswith(MARGIN)
                better = one.difference < 0 if task == "wikitext2" else one.difference > 0
                told: dict[str, Any] = {
                    "task": measured_name(task, measure),
                    "published": math.nan if margin else printed,
                }
                told |= {"here": one.difference, "low": one.low, "high": one.high}
                told["verdict"] = ("better" if better else "worse") if one.decided else "undecided"
                lines.append(pair | told | {"gap": told["here"] - told["published"]})
    columns = ("base", "rank", "extra", "task", "against", "published", "here", "low", "high", "gap", "verdict")
    return pandas.DataFrame(lines, columns=columns)


def published_difference(eora: TableRow, rival: TableRow, task: str) -> float:
    """EoRA minus the rival as the paper prints them; NaN where one of the two is not printed."""
    ours, theirs = (one.published.get(STANDS_FOR.get(task, task), math.nan) for one in (eora, rival))
    if task == "wikitext2":
        return math.log(ours / theirs)
    return (ours - theirs) / (1 if task in UNITS else 100)


def spell(seconds: float) -> str:
    """A time as people say it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
