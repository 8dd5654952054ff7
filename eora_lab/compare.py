"""Rivals side by side: one compressed base, several compensators, the same tokens for all."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.blocks import collect_statistics
from eora_lab.evaluate import perplexity
from eora_lab.pipeline import compress_model
from eora_lab.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One line of a comparison."""

    base: str
    method: str
    rank: int
    perplexity: float
    error: float | None  # relative output error, mean over layers; None for the dense model
    bits_per_weight: float
    seconds: float


def compare(
    model: nn.Module,
    batches: Int[Tensor, "nsamples seqlen"],
    windows: Int[Tensor, "n seqlen"],
    recipes: list[Recipe],
) -> Iterator[Row]:
    """Evaluate the dense model, then a copy of it for every recipe; rows come as they are ready.

    Recipes with inputs="original" share one measurement of the statistics.
    """
    for recipe in recipes:
        recipe.check(model)
    dense_bits = 8.0 * model.dtype.itemsize
    yield Row("dense", "none", 0, perplexity(model, windows, progress=True), None, dense_bits, 0.0)
    original = any(recipe.inputs == "original" for recipe in recipes)
    statistics = collect_statistics(model, batches) if original else None
    for recipe in recipes:
        candidate = copy.deepcopy(model)
        shared = statistics if recipe.inputs == "original" else None
        report = compress_model(candidate, batches, **asdict(recipe), statistics=shared)
        error = sum(layer.error_after for layer in report.layers) / len(report.layers)
        base = f"{recipe.compressor} {recipe.bits}-bit g{recipe.group_size}"
        rank = recipe.rank if recipe.method != "none" else 0
        value = perplexity(candidate, windows, progress=True)
        yield Row(base, recipe.method, rank, value, error, report.bits_per_weight, report.seconds)


def header() -> str:
    """Column titles for `format_row`."""
    titles = f"{'perplexity':>10}  {'output error':>12}  {'bits/weight':>11}  {'s':>6}"
    return f"{'base':16} {'method':12} {'rank':>4}  {titles}"


def format_row(row: Row) -> str:
    """One line of the printed table."""
    error = "" if row.error is None else f"{row.error:.5f}"
    return (
        f"{row.base:16} {row.method:12} {row.rank:4}  {row.perplexity:10.2f}  {error:>12}  "
        f"{row.bits_per_weight:11.2f}  {row.seconds:6.1f}"
    )
