"""All parts together that lose less in the same bytes (`eora-lab compress --recipe best`): the one place."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Literal

from eora_lab.run.budget import Budget
from eora_lab.run.recipe import Recipe

Named = Literal["given", "best"]
BEST: dict[str, Any] = {"method": "eora_fisher", "inputs": "drift", "true_sequential": True, "held_out": 0.125}
BEST_BUDGET: dict[str, Any] = {"objective": "nats"}


def best_recipe(
    recipe: Recipe | Mapping[str, Any] | None = None, budget: Budget | None = None
) -> tuple[Recipe, Budget]:
    """A recipe and a budget with the settings of the best combination, for `compress_model(..., recipe, ranks=budget)`.

    What differs from its default in the given ones stays: such as compressor, bits and rank, or another held-out share;
    a setting that is given as its default is not told from one that is not given.
    recipe: or its settings by name, which are checked once they are filled up: {"distil": True} needs held-out samples.
    Raises EoraLabError as `Recipe` does.
    """
    settings = asdict(recipe) if isinstance(recipe, Recipe) else recipe or {}
    budget = budget or Budget()
    return Recipe(**_filled(Recipe, settings, BEST)), replace(budget, **_filled(Budget, asdict(budget), BEST_BUDGET))


def _filled(kind: type, given: Mapping[str, Any], best: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {one.name: one.default for one in fields(kind)}
    open_ones = {name: value for name, value in best.items() if given.get(name, defaults[name]) == defaults[name]}
    return {**given, **open_ones}
