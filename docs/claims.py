"""The measured numbers of README and guides: the words around them, and how they follow from what is recorded."""

from collections.abc import Iterator
from math import log

import pandas

from docs.claim import SPAN, Claim, interval
from docs.claims_of_formats import of_formats, of_gguf
from docs.records import BASES, LINE, PRINTED, READERS, Numbers, compared, said
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.paper_runs import TableRow, rivalry
from eora_lab.experiment.store import ResultStore, row, scores
from eora_lab.experiment.sweep import expand
from eora_lab.run.intervals import paired
from kernels.cpu_tables import WORDS, in_readme

COLUMNS = ("perplexity", "error", "nbytes", "bits_per_weight")


def of_demo() -> Iterator[Claim]:
    yield Claim(
        "dense none 0 {:.2f} {:.1f} {:.2f} {:.1f}",
        "demo",
        lambda frame: (*_demo(frame, "dense", "none", "perplexity", "nbytes", "bits_per_weight"), None),
    )
    for method in ("none", "svd", "act_s", "eora"):
        path = "0" if method == "none" else "64 uniform 16-bit"
        yield Claim(
            f"rtn 3-bit g64 {method} {path} {{:.2f}} {{:.5f}} {{:.1f}} {{:.2f}} {{:.1f}}",
            "demo",
            lambda frame, method=method: (*_demo(frame, "rtn 3-bit g64", method, *COLUMNS), None),
        )


def _demo(frame: pandas.DataFrame, base: str, method: str, *columns: str) -> Numbers:
    line = frame.loc[(base, method)]
    return [line[name] / 1e6 if name == "nbytes" else line[name] for name in columns]


T2 = {"none": "none |", "ZeroQuant-V2": "ZeroQuant-V2 (SVD) | 32", "Act-S": "Act-S | 32", "EoRA": "EoRA | 32"}


def of_paper() -> Iterator[Claim]:
    for base in ("GPTQ 4-bit", "GPTQ 3-bit"):
        for method, words in T2.items():
            spans = f"{SPAN} | {SPAN}" if method != "EoRA" else "|"
            yield Claim(
                f"| {base} | {words} | {{:.2f}} | {{:.1f}} ± {{:.1f}} | {spans} |",
                "T2",
                lambda known, base=base, method=method: _paper_row(*known, base, method),
            )
    yield Claim(
        "at 3 bits it is **worse** by {:.1f} %", "T2", lambda known: [_against(*known, "GPTQ 3-bit", "Act-S", 32)]
    )
    yield Claim("the three are within {:.1f} % of each other", "T10", lambda known: [_spread(*known, 256)])
    yield Claim("On two cores T2 took {:.0f} minutes", "T2", lambda known: [_minutes(*known)])
    yield Claim("minutes and T10 {:.0f}.", "T10", lambda known: [_minutes(*known)])


def _measured(rows: list[TableRow], store: ResultStore, base: str, method: str, rank: int) -> dict[str, dict]:
    """Task -> its cell."""
    for line in rows:
        cells = {task: store.get(cell.config()) for task, cell in line.cells.items()}
        ranks = {cell.recipe.rank for cell in line.cells.values() if cell.recipe}
        if (line.base, line.method) == (base, method) and ranks == {rank}:
            return {task: row(found) for task, found in cells.items() if found}
    raise LookupError(f"{base}, {method}, {rank}")


def _perplexity(rows: list[TableRow], store: ResultStore, base: str, method: str, rank: int) -> float:
    return _measured(rows, store, base, method, rank)["wikitext2"]["perplexity.wikitext2:test"]


def _paper_row(rows: list[TableRow], store: ResultStore, base: str, method: str) -> Numbers:
    arc = _measured(rows, store, base, method, 0 if method == "none" else 32)["arc_easy"]
    found = [_perplexity(rows, store, base, method, 0 if method == "none" else 32)]
    found += [100 * arc["tasks.arc_easy.value"], 100 * arc["tasks.arc_easy.stderr"]]
    rival = "no compensation" if method == "none" else method
    both = [pairs for what, pairs in rivalry(rows, store).items() if "margin" not in what]
    for pairs in both if method != "EoRA" else ():
        found += interval(pairs[f"{base}, rank 32: against {rival}"])
    return found


def _against(rows: list[TableRow], store: ResultStore, base: str, rival: str, rank: int) -> float:
    """Per cent that EoRA is worse."""
    return 100 * (_perplexity(rows, store, base, "EoRA", rank) / _perplexity(rows, store, base, rival, rank) - 1)


def _spread(rows: list[TableRow], store: ResultStore, rank: int) -> float:
    found = [_perplexity(rows, store, "SparseGPT 2:4", method, rank) for method in ("ZeroQuant-V2", "Act-S", "EoRA")]
    return 100 * (max(found) / min(found) - 1)


def _minutes(rows: list[TableRow], store: ResultStore) -> float:
    cells: list[Cell] = expand([cell for line in rows for cell in line.cells.values()])
    return sum(found["cost"]["total"] for cell in cells if (found := store.get(cell.config()))) / 60


def of_task_mix() -> Iterator[Claim]:
    for n, words in enumerate(("WikiText-2", "ARC", "half ARC, half WikiText-2", "no path")):
        spans = f"{SPAN} | {SPAN}" if n else "|"
        yield Claim(
            f"| {words} | {{:.2f}} | {{:.2f}} | {{:.1f}} ± {{:.1f}} | {spans} |",
            "task-mix",
            lambda cells, n=n: _mixed(cells, n),
        )


def _mixed(cells: list[dict], n: int) -> Numbers:
    flat, ours, first = row(cells[n]), scores(cells[n]), scores(cells[0])
    found = [flat["perplexity.arc:test"], flat["perplexity.wikitext2:test"]]
    found += [100 * flat["tasks.arc_easy.value"], 100 * flat["tasks.arc_easy.stderr"]]
    for measure in ("log perplexity arc:test", "arc_easy acc") if n else ():
        found += interval(paired(first[measure], ours[measure]))
    return found


def of_readme() -> Iterator[Claim]:
    """The short table and the sentences of the first page."""
    yield Claim("full precision has {:.2f}:", "rtn", lambda out: [compared(out, base="dense")])
    for bits in (4, 3):
        yield Claim(
            f"| RTN {bits}-bit | {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.2f}} |",
            "rtn",
            lambda out, base=f"rtn {bits}-bit g64": [
                compared(out, base=base, method=method, rank=64 if method != "none" else 0)
                for method in ("none", "svd", "qera_approx", "eora")
            ],
        )
    yield Claim(
        "a Q2_K file comes from {:.2f} to {:.2f} with an adapter of rank 64",
        "gguf",
        lambda known: (known["Q2_K", "none", 0, ""], known["Q2_K", "eora", 64, "F16"]),
    )


def of_round_to_nearest() -> Iterator[Claim]:
    yield Claim("| full precision | | | {:.2f} | {:.2f} | 32 |", "rtn", lambda out: (compared(out, base="dense"), None))
    for bits in (4, 3):
        for method, rank in (("none", 0), *((m, r) for m in ("svd", "qera_approx", "eora") for r in (32, 64))):
            reference = "{:.2f}" if method in ("none", "eora") or rank == 64 else ""
            text = f"| RTN {bits}-bit | {method} | {rank or ''} | {{:.2f}} | {reference} | {{:.2f}} |"
            want = {"base": f"rtn {bits}-bit g64", "method": method, "rank": rank}
            rest = [None] if reference else []
            yield Claim(
                text,
                "rtn",
                lambda out, want=want, rest=rest: (compared(out, **want), *rest, compared(out, "bits", **want)),
            )
            size = bits + 1 + path_bits(rank)  # a float32 scale and offset for 64 weights
            yield Claim(text, "arithmetic", lambda _, rest=rest, size=size: (None, *rest, size))
    yield Claim(
        "EoRA rank 64 on RTN 3-bit reaches {:.2f}", "rtn-compensated", lambda out: [compared(out, method="eora")]
    )
    yield Claim("--true-sequential`), it reaches {:.2f}", "drift", lambda out: [compared(out, method="eora")])
    yield from of_all_parts()
    yield Claim(
        "uniform {:.2f}, relative output error minimised {:.2f}, absolute output error minimised {:.2f}",
        "budget",
        lambda out: [compared(out, budget=name) for name in ("uniform", "relative", "absolute")],
    )
    yield Claim(
        "rank 64 of `eora_fisher` gives {:.2f}, and {:.2f} where ranks are spread in nats",
        "fisher",
        lambda out: [compared(out, budget=name) for name in ("uniform", "nats")],
    )
    for rank in (32, 64, 128):
        text = f"| {rank} | 16-bit | {{:.2f}} | {{:.1f}} | | {rank} | 4-bit | {{:.2f}} | {{:.1f}} |"
        yield Claim(
            text,
            "factor-bits",
            lambda out, rank=rank: [
                compared(out, number, rank=rank, factors=bits) for bits in (16, 4) for number in ("perplexity", "MB")
            ],
        )
        size = 30 * sum(rows * columns for rows, columns in SHAPES) * (4 + path_bits(rank)) / 8e6
        yield Claim(text, "arithmetic", lambda _, size=size: (None, size, None, None))
    yield Claim(
        "Four bits cost {:.1f} % at rank 64",
        "arithmetic",
        lambda text: [percent(*text("| 64 | 16-bit | {:.2f} | 92.2 | | 64 | 4-bit | {:.2f} |"))],
    )


SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))  # a block's linears


def path_bits(rank: int) -> float:
    """Bits a weight of a path in 16 bits."""
    return 16 * rank * sum(map(sum, SHAPES)) / sum(rows * columns for rows, columns in SHAPES)


def percent(one: float, other: float) -> float:
    """That the second number is above the first."""
    return 100 * (other / one - 1)


def of_all_parts() -> Iterator[Claim]:
    sized = ("perplexity", "arc", "MB")
    dense = "| full precision | {:.2f} | {:.2f} | |"
    eora, whole = (
        "| EoRA rank 64 | {:.2f} | {:.2f} | {:.1f} |",
        "| all parts, rank 64 on average | {:.2f} | {:.2f} | {:.1f} |",
    )
    yield Claim(dense, "together-eora", lambda out: said(out, r"dense +none +0 +([\d.]+) +([\d.]+)"))
    for text, record, method in (
        ("| no path | {:.2f} | {:.2f} | {:.1f} |", "together-eora", "none"),
        (eora, "together-eora", "eora"),
        (whole, "together", "eora_fisher"),
    ):
        yield Claim(
            text,
            record,
            lambda out, method=method: [compared(out, name, method=method, base="rtn 3-bit g64") for name in sized],
        )
    yield Claim(
        "{:.0f} % stay on WikiText-2 and {:.0f} % on ARC, here",
        "arithmetic",
        lambda text: [
            100 * log(w / d) / log(e / d) for w, e, d in zip(text(whole), text(eora), text(dense), strict=False)
        ],
    )
    yield Claim(
        "in another order gave {:.2f} and {:.2f}",
        "together-before",
        lambda out: [compared(out, name, method="eora_fisher") for name in ("perplexity", "arc")],
    )
    yield Claim(
        "It takes {:.0f} minutes on one thread",
        "together",
        lambda out: [compared(out, "seconds", method="eora_fisher") / 60],
    )
    yield Claim(
        "as deployed (second row below), {:.2f} and {:.2f}",
        "together-gptq",
        lambda out: [compared(out, name, method="eora_fisher") for name in ("perplexity", "arc")],
    )
    yield Claim(
        "WikiText-2 is at {:.2f}, where EoRA", "together-wanda", lambda out: [compared(out, method="eora_fisher")]
    )
    yield Claim("on a frozen base is at {:.2f}", "wanda", lambda out: [compared(out, method="eora")])
    yield Claim(
        "on six bases) come to {:.2f} and {:.2f}",
        "beyond",
        lambda found: found["sparsegpt 2:4 4-bit g64 x3"].values(),
    )
    yield Claim(
        "EoRA on the frozen base is at {:.2f} on WikiText-2", "sparsegpt-4", lambda out: [compared(out, method="eora")]
    )


def of_bases() -> Iterator[Claim]:
    words = ("GPTQ 4-bit", "GPTQ 3-bit, integer zero points, 16-bit scales ({:.2f} bits a weight, as on disk)")
    for name, base in zip(BASES, (*words, "Wanda 2:4", "SparseGPT 2:4", "SparseGPT 2:4 + 4-bit"), strict=True):
        four = f"| {base} | " + "{:.2f} | " * 4
        bits = ["bits"] if "{" in base else []
        yield Claim(
            four,
            name,
            lambda out, bits=bits: (
                [compared(out, one, method="none", base=_base(out)) for one in bits]
                + [compared(out, method=method, base=_base(out)) for method in ("none", "svd", "act_s", "eora")]
            ),
        )
        if f"{name}-rounds" in PRINTED:
            yield Claim(four + "{:.2f} |", f"{name}-rounds", lambda out: [None] * 4 + [compared(out, method="eora")])
    yield Claim(
        "there Act-S is {:.1f} % lower",
        "arithmetic",
        lambda text: [-percent(*text("| GPTQ 4-bit | 38.87 | 37.47 | {:.2f} | {:.2f} |")[::-1])],
    )


def _base(printed: str) -> str:
    """Of the rows that are not dense."""
    return next(one["base"] for one in LINE.finditer(printed) if one["base"] != "dense")


def of_passes() -> Iterator[Claim]:
    """Times and peaks are those of a machine at rest, and not judged by what another run takes."""
    yield Claim("whole model take {:.0f} s and {:.2f} GB", "compress", lambda _: (None, None))
    text = "perplexity {:.2f}, {:.3f} times that of full precision; {:.1f} s for both steps, peak memory {:.2f} GB"
    yield Claim(text, "gptq-8", lambda out: (*_times(out), None, None))
    yield Claim(
        text,
        "arithmetic",
        lambda known: (None, known(text)[0] / known("| full precision | | | {:.2f} |")[0], None, None),
    )
    yield Claim(
        "memory was {:.1f} GB at the most, {:.1f} GB predicted, in {:.0f} minutes",
        "scale",
        lambda found: (found["anonymous"] / 1e9, found["predicted"] / 1e9, None),
    )
    for shape in ("4096 x 4096", "14336 x 4096", "4096 x 14336"):
        words = f"| {shape} | {{:.2f}} s | {{:.2f}} s | {{:.0f}} | {{:.9f}} |"
        loss = rf"{shape.replace(' ', '')} +[\d.]+ +[\d.]+ +\d+x +([\d.]+)"
        yield Claim(words, "bench", lambda out, loss=loss: (None, None, None, *said(out, loss)))
        yield Claim(words, "arithmetic", lambda text, words=words: _ratio(*text(words)))


def of_peers() -> Iterator[Claim]:
    both = ["quantise", "eora"]
    yield Claim(
        "| GPTQModel, GPTQ, then EoRA in float16 | {:.0f} | {:.2f} |",
        "peers",
        lambda found: (found["seconds"][both].sum(), found["perplexity"]["eora"]),
    )
    for name, step in (("same grids", "matched grids"), ("its defaults", "its defaults")):
        yield Claim(
            f"| EoRA Lab, {name} | {{:.0f}} | {{:.2f}} |",
            "peers",
            lambda found, step=step: (found["seconds"][step], found["perplexity"][step]),
        )


def _times(printed: str) -> Numbers:
    dense, compressed = said(printed, r"perplexity on .*: dense ([\d.]+), compressed ([\d.]+)")
    return compressed, compressed / dense


def _ratio(ours: float, reference: float, *_: float) -> Numbers:
    return None, None, reference / ours, None


def of_cpu() -> Iterator[Claim]:
    """Of the part that `kernels.bench --cpu` prints for the README; none before anything is recorded."""
    for words in WORDS if READERS["cpu"]() else ():
        yield Claim(words, "cpu", lambda result, words=words: in_readme(result)[words])


CLAIMS = [
    *of_readme(),
    *of_demo(),
    *of_paper(),
    *of_task_mix(),
    *of_gguf(),
    *of_formats(),
    *of_round_to_nearest(),
    *of_bases(),
    *of_passes(),
    *of_peers(),
    *of_cpu(),
]
EXEMPT = (  # numbers that are not measured; and a time to load, which has no command
    r"!\[[^\]]*\]",  # what a figure says, which its own test holds to its numbers
    r"Python 3\.11 to 3\.13",
    r"(?:arXiv[ :]|abs/)\d{4}\.\d{5}",
    r"\*\* 0\.75",
    r"Apache-2\.0",
    r"--held-out 0\.125",
    r"first token take about 3\.5 s",
)
