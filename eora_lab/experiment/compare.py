"""Methods side by side: cells that share a calibration pass and a compressed base, a row each, as they are ready."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eora_lab.errors import EoraLabError
from eora_lab.experiment.cache import ContentCache
from eora_lab.experiment.cells import DENSE, Cell
from eora_lab.experiment.identity import Identities, differences
from eora_lab.experiment.job import run_and_keep
from eora_lab.experiment.store import ResultStore
from eora_lab.experiment.sweep import highest_ranks
from eora_lab.files import digest

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class ComparisonRow:
    """One line of a comparison."""

    base: str
    method: str
    rank: int  # the average, where a budget spreads it
    budget: str
    factor_bits: int
    perplexity: dict[str, float]  # text -> value
    error: float | None  # relative output error, mean over layers; None for the dense model
    nbytes: int  # of the compressed linears
    bits_per_weight: float
    seconds: float  # of compressing and compensating
    shared_factors: bool = False


def compare(cells: list[Cell], store: ResultStore, device: str = "cpu") -> Iterator[ComparisonRow]:
    """Run cells one after another; those that the store has already are taken from there.

    Raises EoraLabError when one fails, with its reason; it is tried again the next time.
    """
    cache, identities, highest = ContentCache(store.folder / "cache"), Identities(hub=True), highest_ranks(cells)
    for cell in cells:
        config = cell.config()
        found = store.get(config)
        if found is None or found["status"] == "failed" or differences(found["identity"], identities.of(cell)):
            rank = highest[digest(config)]
            if error := run_and_keep(cell, rank, store, cache, identities, device=device, progress=True):
                raise EoraLabError(error)
            found = store.get(config)
        assert found is not None  # it was kept
        yield comparison_row(cell, found)


def comparison_row(cell: Cell, found: dict) -> ComparisonRow:
    """A cell's line, from what the store holds of it."""
    recipe, result = cell.recipe, found["result"]
    return ComparisonRow(
        base=recipe.base if recipe else DENSE,
        method=recipe.method if recipe else "none",
        rank=recipe.rank if recipe else 0,
        budget=cell.budget,
        factor_bits=recipe.factor_bits if recipe else 16,
        perplexity=result.get("perplexity", {}),
        error=result["output_error"]["after"] if recipe else None,
        nbytes=result["nbytes"],
        bits_per_weight=result["bits_per_weight"],
        seconds=found["cost"].get("compress", 0.0),
        shared_factors=recipe is not None and recipe.shares,
    )


def header(texts: list[str]) -> str:
    """Column titles for `format_row`. texts: that perplexity is measured on."""
    names = texts if len(texts) > 1 else ["perplexity"]
    settings, numbers = "base method rank budget factors", "output-error MB bits/weight s"
    return _line(settings.split(), names, numbers.split(), names)


def format_row(row: ComparisonRow, texts: list[str]) -> str:
    """One line of the printed table."""
    settings = [row.base, row.method, str(row.rank)]
    factors = f"{row.factor_bits}-bit" + (" shared" if row.shared_factors else "")
    settings += [row.budget, factors] if row.rank > 0 else ["", ""]
    numbers = ["" if row.error is None else f"{row.error:.5f}", f"{row.nbytes / 1e6:.1f}"]
    numbers += [f"{row.bits_per_weight:.2f}", f"{row.seconds:.1f}"]
    names = texts if len(texts) > 1 else ["perplexity"]
    return _line(settings, [f"{row.perplexity[text]:.2f}" for text in texts], numbers, names)


def _line(settings: list[str], perplexities: list[str], numbers: list[str], names: list[str]) -> str:
    shown = "  ".join(f"{value:>{max(len(name), 10)}}" for value, name in zip(perplexities, names, strict=True))
    return "{:24} {:12} {:>4} {:9} {:>7}  {}  {:>12}  {:>8}  {:>11}  {:>6}".format(*settings, shown, *numbers)


def table(rows: list[ComparisonRow], model: str) -> "pandas.DataFrame":
    """Rows as a frame, a line a text, with the name of the model; without seconds, which differ from run to run."""
    import pandas

    lines = [
        {"model": model, "text": text} | asdict(row) | {"perplexity": value}
        for row in rows
        for text, value in row.perplexity.items()
    ]
    rows_alike = not any(row.shared_factors for row in rows)
    return pandas.DataFrame(lines).drop(columns=["seconds", *(["shared_factors"] if rows_alike else [])])
