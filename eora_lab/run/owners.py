"""Who compresses which linear, where several processes share a pass."""

import heapq
from collections.abc import Container, Hashable, Mapping
from typing import TypeVar

from torch import nn

from eora_lab.calibrate.contract import Contract
from eora_lab.compensate import krylov
from eora_lab.model.structure import decoder_blocks, linears
from eora_lab.run.groups import sharing
from eora_lab.run.memory import ITERATIVE
from eora_lab.run.recipe import Recipe

T = TypeVar("T", bound=Hashable)


def pack(costs: Mapping[T, float], count: int) -> dict[T, int]:
    """Name -> one of `count` bins: the largest first, each where there is least.

    The fullest bin is then at most 4/3 of what it could be (Graham, Bounds on multiprocessing timing anomalies, 1969).
    """
    bins = [(0.0, number) for number in range(count)]
    found: dict[T, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        load, number = bins[0]
        found[name] = number
        heapq.heapreplace(bins, (load + costs[name], number))
    return found


def cost(linear: nn.Linear, recipe: Recipe, given: bool) -> float:
    """Multiplications, roughly, that compressing, compensating and judging a linear takes; of float64 twice as many.

    given: it comes compressed.
    """
    rows, columns = linear.out_features, linear.in_features
    found = 1.0 * rows * columns**2  # E|W x|² and the error, half of a product each
    if not given and recipe.compressor in ITERATIVE:  # a factor of the inverse of S, and a sweep over the columns
        found += 3 * columns**3 + rows * columns**2
    if recipe.method != "none" and krylov.worth_it(linear.weight, recipe.rank):
        size = krylov.dimensions(recipe.rank)[0]
        found += size * (2 * rows * columns + columns**2) + 2 * size**2 * rows
    elif recipe.method != "none":
        small, large = sorted((rows, columns))
        found += 2 * (rows * columns**2 + small**2 * large) + 20 * small**3  # R S Rᵀ and its eigenvectors
    return found


def owners(
    model: nn.Module, recipe: Recipe, contract: Contract, left: Container[str], given: bool, count: int
) -> dict[str, int]:
    """Module name -> which of `count` processes compresses it, of all that do not stay as they are.

    Those that are compressed at once are spread by their cost: all of a block, or with true_sequential those that share
    their input. Those that share A stay together. left: linears that stay as they are. given: W^ is.
    """
    found: dict[str, int] = {}
    for prefix, block in decoder_blocks(model).items():
        at_once: dict[str, dict[tuple[str, ...], float]] = {}
        own = {f"{prefix}.{local}": linear for local, linear in linears(block).items()}
        for names in sharing([name for name in own if name not in left], contract, recipe.shares):
            stage = contract.shared.get(names[0], names[0]) if recipe.true_sequential else prefix
            at_once.setdefault(stage, {})[names] = sum(cost(own[name], recipe, given) for name in names)
        for costs in at_once.values():
            found |= {name: owner for names, owner in pack(costs, count).items() for name in names}
    return found
