"""What the numbers of README and guides follow from: recorded cells and frames, and what commands printed."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas

from eora_lab.experiment.paper_runs import TableRow, table_rows
from eora_lab.experiment.store import ResultStore, row
from eora_lab.experiment.sweep import expand, read_grid

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "data" / "measured"

WIDENED = 30 * 768 * (2 * 768 + 2 * 256 + 3 * 1536)  # weights in linears of the model that `docs.gguf` writes

Numbers = Sequence[float | None]  # None: a number that is not judged, such as a time

# --- records that are drawn as figures too -------------------------------------------------------------------------


def demo() -> pandas.DataFrame:
    """The table of `make demo`."""
    return pandas.read_csv(ROOT / "figures" / "demo.csv").set_index(["base", "method"])


def paper(table: str) -> tuple[list[TableRow], ResultStore]:
    """A table of the paper at small scale, and the cells of it."""
    return table_rows(table, "smollm2-135m", "small"), ResultStore(MEASURED / "paper")


def task_mix() -> list[dict]:
    """The cells of the ablation, in the order of the guide: WikiText-2, ARC, both, no path."""
    store = ResultStore(MEASURED / "task-mix")
    found = [store.get(cell.config()) for cell in expand(read_grid("task-mix"))]
    order = ("wikitext2:validation", "arc", "arc+wikitext2:validation")
    by_source = {one["config"]["source"]: one for one in found if one and one["config"]["method"] == "eora"}
    return [by_source[name] for name in order] + [one for one in found if one and one["config"]["method"] == "none"]


def beyond() -> dict[str, dict[str, float]]:
    """Base -> perplexities with all parts together and 16-bit factors, where that is recorded."""
    store, found = ResultStore(MEASURED / "beyond"), {}
    for cell in expand(read_grid("beyond")):
        whole = cell.recipe and cell.recipe.inputs == "drift" and cell.recipe.method == "eora_fisher"
        if whole and cell.recipe.factor_bits == 16 and not cell.recipe.distil and (known := store.get(cell.config())):
            found[cell.recipe.base] = known["result"]["perplexity"]
    return found


def formats() -> dict[tuple, dict]:
    """(grid, compressor, method, rank) -> the cell's row."""
    store = ResultStore(MEASURED / "formats")
    found = {}
    for cell in expand(read_grid("formats")):
        if cell.recipe:
            known = store.get(cell.config())
            assert known, cell.label
            key = cell.recipe.grid, cell.recipe.compressor, cell.recipe.method, cell.recipe.rank
            found[key] = row(known)
    return found


def gguf() -> dict[tuple, float]:
    """(type, method, rank, type of the factors) -> perplexity in llama.cpp; (type, "bits") -> of a weight in a linear;
    (rank, type of the factors, "bits") -> that a path adds to it."""
    frame = pandas.read_csv(MEASURED / "gguf.csv", keep_default_na=False)
    found: dict[tuple, float] = {}
    for one in frame.itertuples():
        found[one.type, one.method, one.rank, one.factors] = one.perplexity
        found[one.type, "bits"] = one.bits
        found[one.rank, one.factors, "bits"] = one.mbytes * 8e6 / WIDENED
    return found


def gguf_speed() -> dict[tuple, float]:
    """(type, rank, type of the factors) -> tokens a second in llama.cpp."""
    frame = pandas.read_csv(MEASURED / "gguf-speed.csv", keep_default_na=False)
    return {(one.type, one.rank, one.factors): one.tokens_per_second for one in frame.itertuples()}


def scale() -> dict:
    """What `docs.scale` printed of the 7B-shaped file."""
    (found,) = pandas.read_csv(MEASURED / "scale.csv").query("task == 'mend' and hidden == 4096").to_dict("records")
    return found


def peers() -> pandas.DataFrame:
    """What `docs.peers` printed: by step."""
    return pandas.read_csv(MEASURED / "peers.csv").set_index("step")


def cpu() -> dict | None:
    """What `kernels.bench --cpu` recorded on the machine that the README speaks of."""
    path = ROOT / "kernels" / "results" / "cpu" / "AMD-EPYC.json"
    return json.loads(path.read_text()) if path.exists() else None


READERS: dict[str, Callable[[], Any]] = {
    "cpu": cpu,
    "scale": scale,
    "peers": peers,
    "beyond": beyond,
    "formats": formats,
    "gguf": gguf,
    "gguf-speed": gguf_speed,
    "demo": demo,
    "T2": lambda: paper("T2"),
    "T10": lambda: paper("T10"),
    "task-mix": task_mix,
}

# --- records of what commands print: how the command begins in a text, and what is put in place of what -----------

OTHERS = "--method none svd act_s eora"
THREE = (OTHERS, "--method eora --rounds 3")
BASES = {
    "gptq-4": "--compressor gptq --bits 4 --mse",
    "gptq-3": "--compressor gptq --bits 3 --mse --zero-point integer --scale-dtype float16",
    "wanda": "--compressor wanda --sparsity 2:4 --bits 16",
    "sparsegpt": "--compressor sparsegpt --sparsity 2:4 --bits 16",
    "sparsegpt-4": "--compressor sparsegpt --sparsity 2:4 --bits 4 --mse",
}
RTN = "eora-lab compare --compressor rtn --bits 4 3"
PARTS = "--inputs drift --held-out 0.125 --true-sequential --method eora_fisher --budget nats"
WHOLE = f"eora-lab compare --compressor rtn --bits 3 {PARTS}"
PRINTED: dict[str, tuple] = {
    "rtn": (RTN,),
    "rtn-compensated": (RTN, ("--bits 4 3 --rank 32 64", "--bits 3 --method eora"), ("original", "compensated")),
    "drift": (
        RTN,
        ("--bits 4 3 --rank 32 64", "--bits 3 --method eora"),
        ("--inputs original", "--inputs drift --held-out 0.125 --true-sequential"),
    ),
    "together": (WHOLE,),
    "together-before": (WHOLE,),  # with the same sums in another order
    "together-eora": (WHOLE, (PARTS, "--inputs original --method none eora")),
    "together-gptq": (WHOLE, ("--compressor rtn --bits 3", BASES["gptq-3"])),
    "together-wanda": (WHOLE, ("--compressor rtn --bits 3", BASES["wanda"] + " --rounds 2")),
    **{name: ("eora-lab compare BASE", ("BASE", base)) for name, base in BASES.items()},
    **{f"{name}-rounds": ("eora-lab compare BASE", ("BASE", BASES[name]), THREE) for name in BASES if name[-1] in "4t"},
    "compress": ("eora-lab compress runs/g4",),
    "gptq-8": ("eora-lab compress runs/gptq",),
    "budget": ("eora-lab compare --compressor rtn --bits 3 --inputs original --method eora --budget",),
    "fisher": ("eora-lab compare --method eora_fisher --budget uniform nats --compressor rtn",),
    "factor-bits": ("eora-lab compare --compressor rtn --bits 3 --inputs original --method eora --rank",),
    "bench": ("eora-lab bench --shapes 4096x4096 14336x4096",),
}
LINE = re.compile(
    r"^(?P<base>\S.*?)\s+(?P<method>none|svd|act_s|qera_approx|eora_fisher|eora)\s+(?P<rank>\d+)(?:\s+(?P<budget>[a-z]+)\s+"
    r"(?P<factors>\d+)-bit)?\s+(?P<perplexity>[\d.]+)(?:\s+(?P<arc>[\d.]+)(?=(?:\s+[\d.]+){4}$))?(?:\s+[\d.]+)?"
    r"\s+(?P<MB>[\d.]+)\s+(?P<bits>[\d.]+)\s+(?P<seconds>[\d.]+)$",
    re.M,
)


def compared(printed: str, number: str = "perplexity", **settings: str | int) -> float:
    """A number of the one row of `eora-lab compare` that has these settings; None stands for none."""
    wanted = {name: str(value) for name, value in settings.items()}
    (found,) = (one for one in LINE.finditer(printed) if wanted.items() <= one.groupdict().items())
    return float(found[number])


def said(printed: str, words: str) -> Numbers:
    """The numbers in a printed text, by a regular expression."""
    found = re.search(words, printed)
    assert found, words
    return tuple(map(float, found.groups()))
