"""One layer: compress its weight, compensate the error. The pass, the rank plan and sweeps all go through here."""

import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compensate import LowRank, solve, store_factors
from eora_lab.compensate.shrinkage import solve_shrunk
from eora_lab.compress import COMPRESSORS, Compressed, Grid, reround, residual
from eora_lab.errors import EoraLabError
from eora_lab.run.recipe import Recipe


def taken(compressor: Callable, given: dict) -> dict:
    """The settings that a compressor's signature names; **grid stands for the fields of `Grid`."""
    names = set()
    for parameter in inspect.signature(compressor).parameters.values():
        rest = parameter.kind is inspect.Parameter.VAR_KEYWORD
        names |= {field.name for field in fields(Grid)} if rest else {parameter.name}
    return {name: value for name, value in given.items() if name in names}


def check_statistics(
    statistics: Mapping[str, InputStatistics] | None, recipe: Recipe, given: bool, batches: bool
) -> None:
    """Raise EoraLabError where statistics that were measured before do not do for a recipe.

    given: weights come compressed. batches: there are texts to measure on.
    """
    if statistics is None:
        if not batches:
            raise EoraLabError(
                "batches must be token ids (nsamples, seqlen), not None: only with statistics= can they be left out"
            )
        return
    if recipe.inputs != "original":
        raise EoraLabError('statistics measured before are of the original model: pass inputs="original"')
    if any(one.diagonal for one in statistics.values()):
        check_diagonal(recipe, given)


@torch.no_grad()
def check_diagonal(recipe: Recipe, given: bool) -> None:
    """Raise EoraLabError where a recipe needs more than E[x²] of every channel. given: weights come compressed."""
    width = max(recipe.group_size or 0, 64)
    weight, statistics, steps = torch.eye(8, width), InputStatistics.from_power(torch.ones(width), width), Steps(recipe)
    if recipe.held_out:
        raise EoraLabError("no tokens were held out where only E[x²] is known: leave held_out at 0")
    try:
        if not given:
            steps.compress("", weight, statistics)
        low_rank, _ = steps.compensate("", weight, statistics, 1)
        store_factors(low_rank, recipe.factor_bits, (weight, statistics) if recipe.refit else None)
    except EoraLabError as error:
        what = recipe.method if given else f"{recipe.compressor} and {recipe.method}"
        raise EoraLabError(f"{what}: {error}") from error


class Steps:
    """How a layer is compressed and compensated: by a recipe, or with W^ made elsewhere.

    A sweep hands in steps that keep what they made for other cells (`eora_lab.experiment.cache`).

    weights: module name -> W^, in place of the compressor.
    reround: give these other codes on their own grids, see `eora_lab.compress.reround`.
    Raises EoraLabError where there are no weights to round again.
    """

    def __init__(self, recipe: Recipe, weights: Mapping | None = None, reround: bool = False):
        if reround and weights is None:
            raise EoraLabError(
                "only weights that come compressed can be rounded again: give them, or leave reround out"
            )
        self.recipe, self.weights, self.reround = recipe, weights, reround

    def about(self) -> dict[str, bool]:
        """What a run notes beside the recipe and where the weights come from."""
        return {"reround": True} if self.reround else {}

    def compress(self, name: str, weight: Float[Tensor, "out in"], statistics: InputStatistics) -> Compressed:
        """W^ of the layer of that name. weight: float32."""
        if self.weights is not None:
            return reround(weight, statistics, self.weights[name]) if self.reround else self.weights[name]
        compressor = COMPRESSORS[self.recipe.compressor]
        return compressor(weight, statistics, **taken(compressor, self.recipe.base_settings()))

    def compensate(
        self, name: str, error: Float[Tensor, "out in"], statistics: InputStatistics, rank: int
    ) -> tuple[LowRank, float]:
        """The answer to R = W - W^, and the shrinkage that was chosen."""
        if self.recipe.shrink:
            return solve_shrunk(self.recipe.method, error, statistics, rank)
        return solve(self.recipe.method, error, statistics, rank), 0.0


@dataclass
class Fit:
    """A weight compressed and compensated: R = W - W^ and the answer to it."""

    compressed: Compressed
    residual: Float[Tensor, "out in"]
    low_rank: LowRank
    shrinkage: float
    seconds_compress: float = 0.0
    seconds_solve: float = 0.0


def fit_layer(
    name: str,
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    steps: Steps,
    rank: int,
    step: Float[Tensor, "out in"] | None = None,
) -> Fit:
    """Compress W, compensate; then compress W - B A, compensate again, for as many rounds as the recipe says.

    weight: in the dtype of the model. step: what is added to it, so that the layer aims at more than W.
    A round that does not lower the loss, which greedy compressors can cause, ends it.
    """
    best: Fit | None = None
    aim = weight.float() if step is None else weight.float() + step
    target, seconds, lowest = aim, [0.0, 0.0], math.inf
    rounds = steps.recipe.rounds if rank else 1
    for _ in range(rounds):
        start = time.perf_counter()
        compressed = steps.compress(name, target, statistics)
        compressed_at = time.perf_counter()
        error = residual(weight, compressed) if step is None else residual(weight, compressed) + step
        low_rank, shrinkage = steps.compensate(name, error, statistics, rank)
        seconds[0] += compressed_at - start
        seconds[1] += time.perf_counter() - compressed_at
        fit = Fit(compressed, error, low_rank, shrinkage)
        if rounds > 1:
            path = low_rank.dense()
            loss = output_energy(error - path, statistics.metric)
            if best and loss >= lowest:
                break
            target, lowest = aim - path, loss
        best = fit
    assert best is not None
    best.seconds_compress, best.seconds_solve = seconds
    return best
