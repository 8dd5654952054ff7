"""All parts together that lose less in the same bytes (`eora-lab compress --recipe best`): the one place."""

from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

from eora_lab.run.budget import Budget
from eora_lab.run.recipe import Recipe

Named = Literal["given", "best"]
BEST: dict[str, Any] = {
    "method": "eora_fisher",
    "inputs": "drift",
    "true_sequential": True,
    "held_out": 0.125,
    "rounds": 3,
}
BEST_BUDGET: dict[str, Any] = {"objective": "nats"}
S = TypeVar("S", Recipe, Budget)


def best_recipe(recipe: Recipe | None = None, budget: Budget | None = None) -> tuple[Recipe, Budget]:
    """A recipe and a budget with the settings of the best combination, for `compress_model(..., recipe, ranks=budget)`.

    What differs from its default in the given ones stays: such as compressor, bits and rank, or another held-out share.
    """
    return _filled(recipe or Recipe(), BEST), _filled(budget or Budget(), BEST_BUDGET)


def _filled(given: S, best: dict[str, Any]) -> S:
    defaults = {one.name: one.default for one in fields(given)}
    return replace(given, **{name: value for name, value in best.items() if getattr(given, name) == defaults[name]})
