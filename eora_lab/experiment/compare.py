"""Rivals side by side: one compressed base, several compensators, the same tokens for all."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.calibrate.stream import collect_statistics
from eora_lab.compensate.budget import Budget
from eora_lab.measure.evaluate import perplexity
from eora_lab.model.structure import decoder_blocks, linears
from eora_lab.run.pipeline import compress_model
from eora_lab.run.ranks import plan_ranks
from eora_lab.run.recipe import Recipe

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Row:
    """One line of a comparison."""

    base: str
    method: str
    rank: int  # the average, where a budget spreads it
    budget: str
    factor_bits: int
    perplexity: float
    error: float | None  # relative output error, mean over layers; None for the dense model
    nbytes: int  # of the compressed linears
    bits_per_weight: float
    seconds: float


def compare(
    model: nn.Module,
    batches: Int[Tensor, "nsamples seqlen"],
    windows: Int[Tensor, "n seqlen"],
    recipes: list[Recipe],
    budgets: tuple[Budget, ...] = (Budget(),),
) -> Iterator[Row]:
    """Evaluate the dense model, then a copy of it for every recipe and budget; rows come as they are ready.

    Recipes with inputs="original", and all budgets but the uniform one, share one measurement of the statistics.
    """
    for recipe in recipes:
        recipe.check(model)
    dense_bits = 8.0 * model.dtype.itemsize
    weights = sum(
        linear.weight.numel() for block in decoder_blocks(model).values() for linear in linears(block).values()
    )
    dense = perplexity(model, windows, progress=True)
    yield Row("dense", "none", 0, "uniform", 16, dense, None, weights * model.dtype.itemsize, dense_bits, 0.0)
    planned = any(budget != Budget() for budget in budgets)
    original = planned or any(recipe.inputs == "original" for recipe in recipes)
    statistics = collect_statistics(model, batches, max(r.held_out for r in recipes)) if original else None
    for recipe in recipes:
        for budget in budgets if recipe.method != "none" else (Budget(),):
            ranks = plan_ranks(model, statistics, recipe, budget) if budget != Budget() else None
            candidate = copy.deepcopy(model)
            shared = statistics if recipe.inputs == "original" else None
            report = compress_model(candidate, batches, **asdict(recipe), ranks=ranks, statistics=shared)
            yield Row(
                base=recipe.base,
                method=recipe.method,
                rank=recipe.rank if recipe.method != "none" else 0,
                budget=budget.objective,
                factor_bits=recipe.factor_bits,
                perplexity=perplexity(candidate, windows, progress=True),
                error=sum(layer.error_after for layer in report.layers) / len(report.layers),
                nbytes=report.nbytes,
                bits_per_weight=report.bits_per_weight,
                seconds=report.seconds,
            )


COLUMNS = "{:24} {:12} {:>4} {:9} {:>7}  {:>10}  {:>12}  {:>8}  {:>11}  {:>6}"


def header() -> str:
    """Column titles for `format_row`."""
    titles = "base method rank budget factors perplexity output-error MB bits/weight s"
    return COLUMNS.format(*titles.split())


def format_row(row: Row) -> str:
    """One line of the printed table."""
    compensated = row.rank > 0
    return COLUMNS.format(
        row.base,
        row.method,
        row.rank,
        row.budget if compensated else "",
        f"{row.factor_bits}-bit" if compensated else "",
        f"{row.perplexity:.2f}",
        "" if row.error is None else f"{row.error:.5f}",
        f"{row.nbytes / 1e6:.1f}",
        f"{row.bits_per_weight:.2f}",
        f"{row.seconds:.1f}",
    )


def table(rows: list[Row], model: str, text: str) -> "pandas.DataFrame":
    """Rows as a frame, with the names of the model and of the text; without seconds, which differ from run to run."""
    import pandas

    return pandas.DataFrame([{"model": model, "text": text} | asdict(row) for row in rows]).drop(columns="seconds")
