"""One layer, or several that share A: compress, compensate the error. Pass, rank plan and sweeps go through here."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compensate import LowRank, StoredFactors, needs_outputs, store_factors
from eora_lab.compensate.preserve import preserved
from eora_lab.compensate.shared import solve_in_rows
from eora_lab.compress import COMPRESSORS, Compressed, Grid, reround, residual
from eora_lab.environment import step as timing
from eora_lab.errors import EoraLabError
from eora_lab.run.groups import Group, grouped, stacked
from eora_lab.run.recipe import Recipe


def taken(compressor: Callable, given: dict) -> dict:
    """The settings that a compressor's signature names; **grid stands for the fields of `Grid`."""
    names = set()
    for parameter in inspect.signature(compressor).parameters.values():
        rest = parameter.kind is inspect.Parameter.VAR_KEYWORD
        names |= {field.name for field in fields(Grid)} if rest else {parameter.name}
    return {name: value for name, value in given.items() if name in names}


def check_statistics(
    statistics: Mapping[str, InputStatistics] | None, recipe: Recipe, given: bool, batches: bool, outputs: bool = False
) -> None:
    """Raise EoraLabError where statistics that were measured before do not do for a recipe.

    given: weights come compressed. batches: there are texts to measure on. outputs: gradients were measured before.
    """
    if needs_outputs(recipe.method) and not outputs and not batches:
        raise EoraLabError(f"{recipe.method} needs gradients: give token ids, or measure them before (outputs=)")
    if recipe.distil and not batches:
        raise EoraLabError("a step of distillation needs token ids: give them, or leave distil out")
    if recipe.shared_factors and not batches:
        raise EoraLabError("which layers share an input is seen on token ids: give them, or leave shared_factors out")
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
        low_rank, _ = steps.compensate(steps.group([""], [weight], statistics), weight, statistics, 1)
        store_factors(low_rank, recipe.factor_bits, (weight, statistics) if recipe.refit else None)
    except EoraLabError as error:
        what = recipe.method if given else f"{recipe.compressor} and {recipe.method}"
        raise EoraLabError(f"{what}: {error}") from error


class Steps:
    """How a layer is compressed and compensated: by a recipe, or with W^ made elsewhere.

    A sweep hands in steps that keep what they made for other cells (`eora_lab.experiment.cache`).

    weights: module name -> W^, in place of the compressor.
    reround: give these other codes on their own grids, see `eora_lab.compress.reround`.
    outputs: module name -> statistics of its output's gradients, for methods that need them.
    Raises EoraLabError where there are no weights to round again.
    """

    def __init__(
        self,
        recipe: Recipe,
        weights: Mapping | None = None,
        reround: bool = False,
        outputs: Mapping[str, OutputStatistics] | None = None,
    ):
        if reround and weights is None:
            raise EoraLabError(
                "only weights that come compressed can be rounded again: give them, or leave reround out"
            )
        self.recipe, self.weights, self.reround = recipe, weights, reround
        self.outputs = outputs or {}

    def about(self) -> dict[str, bool]:
        """What a run notes beside the recipe and where the weights come from."""
        return {"reround": True} if self.reround else {}

    def compress(self, name: str, weight: Float[Tensor, "out in"], statistics: InputStatistics) -> Compressed:
        """W^ of the layer of that name. weight: float32."""
        if self.weights is not None:
            return reround(weight, statistics, self.weights[name]) if self.reround else self.weights[name]
        compressor = COMPRESSORS[self.recipe.compressor]
        return compressor(weight, statistics, **taken(compressor, self.recipe.base_settings()))

    def again(
        self, name: str, weight: Float[Tensor, "out in"], statistics: InputStatistics, before: Compressed
    ) -> Compressed:
        """W^ for what a low-rank path leaves of the weight: on new grids and with a new mask.

        Weights that came compressed keep their grids (`before`), and their codes too unless they are rounded again.
        For others that would fit the calibration tokens better still, and other tokens worse.
        """
        if self.weights is None:
            return self.compress(name, weight, statistics)
        return reround(weight, statistics, before) if self.reround else before

    def group(
        self, names: Sequence[str], weights: Sequence[Float[Tensor, "_ in"]], statistics: InputStatistics
    ) -> Group:
        """Layers that are compensated together, see `grouped`."""
        return grouped(self.recipe.method, names, weights, statistics, self.outputs)

    def loss(self, group: Group, error: Float[Tensor, "out in"], statistics: InputStatistics) -> float:
        """What an error of these layers costs, in the metric of a method that is an optimum; rounds too are judged by
        it.

        E|D x|², relative to the output of each where there are several; or tr(F D S Dᵀ) with F damped where the method
        needs gradients.
        """
        if group.rows:
            error = group.rows.whitened(error).float()
        return output_energy(error, statistics.metric)

    def compensate(
        self, group: Group, error: Float[Tensor, "out in"], statistics: InputStatistics, rank: int
    ) -> tuple[LowRank, float]:
        """The answer to R = W - W^, and the shrinkage that was chosen."""
        return solve_in_rows(self.recipe.method, error, statistics, rank, group.rows, self.recipe.shrink)


@dataclass
class Fit:
    """Weights compressed and compensated: R = W - W^ (or what is aimed at, less W^), and the answer to it.

    compressed: W^ of each layer. All else is of their rows together.
    """

    compressed: list[Compressed]
    residual: Float[Tensor, "out in"]
    low_rank: LowRank
    factors: StoredFactors
    shrinkage: float
    loss: float = 0.0  # `Steps.loss` of what is left, with factors as stored, where several are tried
    seconds_compress: float = 0.0
    seconds_solve: float = 0.0

    @property
    def path(self) -> Float[Tensor, "out in"]:
        """B A as it is stored."""
        A, B = self.factors.dense()
        return B @ A


def fit_group(
    group: Group,
    statistics: InputStatistics,
    steps: Steps,
    rank: int,
    step: Float[Tensor, "out in"] | None = None,
) -> Fit:
    """Compress W, compensate; then compress W - B A, compensate again, for as many rounds as the recipe says.

    step: what is added to the weights, where layers aim at more than W.
    The best of all rounds is kept. One that does not lower the loss, which greedy compressors can cause, ends them.
    Where the recipe preserves a part of W (`compensate.preserve`), W^ of the rest is tried first.
    """
    weight = group.weight.float()
    aim = weight if step is None else weight + step
    best = _tried(group, aim, None, None, statistics, steps, rank, step)
    kept = _preserved(group, aim, best, statistics, steps, rank)
    takes = [None] * ((steps.recipe.rounds if rank else 1) - 1)  # out of the weight: the path of the best so far
    for take in [*([] if kept is None else [kept]), *takes]:
        found = _tried(group, aim, best.path if take is None else take, best, statistics, steps, rank, step)
        better = found.loss < best.loss
        best, spent = (found if better else best), (best, found)
        best.seconds_compress, best.seconds_solve = (
            sum(getattr(one, f"seconds_{what}") for one in spent) for what in ("compress", "solve")
        )
        if not better and take is None:
            break
    return best


def _tried(
    group: Group,
    aim: Float[Tensor, "out in"],
    take: Float[Tensor, "out in"] | None,
    before: Fit | None,
    statistics: InputStatistics,
    steps: Steps,
    rank: int,
    step: Float[Tensor, "out in"] | None,
) -> Fit:
    """Compress what `take` leaves of the aim, compensate. before: what was found, with the weights to round again."""
    recipe, start = steps.recipe, time.perf_counter()
    with timing("compress"):
        parts = group.parts(aim if take is None else aim - take).items()
        if before is None:
            compressed = [steps.compress(name, one, statistics) for name, one in parts]
        else:
            pairs = zip(parts, before.compressed, strict=True)
            compressed = [steps.again(name, one, statistics, old) for (name, one), old in pairs]
    compressed_at = time.perf_counter()
    with timing("solve"):
        error = stacked([residual(one, made) for one, made in zip(group.weights, compressed, strict=True)])
        error = error if step is None else error + step
        low_rank, shrinkage = steps.compensate(group, error, statistics, rank)
        refit = (error, statistics) if recipe.refit else None
        factors = store_factors(low_rank, recipe.factor_bits, refit, group.rows)
    fit = Fit(compressed, error, low_rank, factors, shrinkage)
    fit.seconds_compress, fit.seconds_solve = compressed_at - start, time.perf_counter() - compressed_at
    if recipe.rounds > 1 or recipe.preserve:
        fit.loss = steps.loss(group, error - fit.path, statistics)
    return fit


def _preserved(
    group: Group, aim: Float[Tensor, "out in"], plain: Fit, statistics: InputStatistics, steps: Steps, rank: int
) -> Float[Tensor, "out in"] | None:
    """The part of the aim that is kept from the compressor; None: nothing is. plain: the fit without it."""
    if not steps.recipe.preserve or not rank:
        return None
    whole, _ = steps.compensate(group, aim, statistics, rank)
    energies = steps.loss(group, aim, statistics), steps.loss(group, plain.residual, statistics)
    count = preserved(whole.spectrum, plain.low_rank.spectrum, energies, rank)
    return whole.truncate(count).dense().float() if count else None
