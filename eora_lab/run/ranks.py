"""Plan the ranks of a pass: one solve a layer gives the eigenvalues that any budget is spread by."""

import re
from collections.abc import Container, Mapping, Sequence

import torch
from torch import nn

from eora_lab.calibrate.contract import SEQUENCES, TOKENS, UNTRIED, Contract, check_blocks
from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.processes import ALONE, Processes
from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compensate import needs_outputs
from eora_lab.compensate.shared import solve_in_rows
from eora_lab.compress import residual
from eora_lab.environment import step
from eora_lab.errors import EoraLabError, as_setting, naming
from eora_lab.model.structure import block_linears, linear_at
from eora_lab.progress import each
from eora_lab.run.budget import Budget, LayerSpectrum, allocate_ranks
from eora_lab.run.fit import Steps
from eora_lab.run.given import named_for
from eora_lab.run.groups import grouped, sharing, stacked
from eora_lab.run.recipe import Recipe


def given_ranks(ranks: Mapping) -> dict[str, int]:
    """Ranks as a caller gives them, module name -> rank. Raises EoraLabError for one that is no rank."""
    found = {str(name): as_setting(int, rank, f"the rank of {name}") for name, rank in ranks.items()}
    for name, rank in found.items():
        if rank < 0:
            raise EoraLabError(f"the rank of {name} must be 0 or more, not {rank}")
    return found


def check_budget(budget: Budget | None, recipe: Recipe) -> None:
    """Raise EoraLabError for a budget in nats where the method measures no gradients, and for one of absolute errors
    where layers share A, which is solved in relative ones.
    """
    if budget and budget.objective == "nats" and not needs_outputs(recipe.method):
        raise EoraLabError("a budget in nats needs the gradients at every layer's output: use method eora_fisher")
    if budget and budget.objective == "absolute" and recipe.shares:
        raise EoraLabError("layers that share A count by relative errors: use a budget that is relative, or in nats")


def plan_ranks(
    model: nn.Module,
    statistics: Mapping[str, InputStatistics],
    recipe: Recipe,
    budget: Budget,
    progress: bool = True,
    weights: Mapping | None = None,
    outputs: Mapping[str, OutputStatistics] | None = None,
) -> dict[str, int]:
    """Module name -> rank, with recipe.rank as the average: what `compress_model(..., ranks=budget)` gives the layers.

    statistics: of the original model, from `collect_statistics`. The model is not changed.
    weights:    as for `compress_model`.
    outputs:    of the original model, from `collect_output_statistics`, for a budget in nats.
    Raises EoraLabError when the recipe or the budget does not fit the model.
    """
    weights = named_for(model, weights)
    recipe.check_fit(model, given=weights)
    check_budget(budget, recipe)
    contract = UNTRIED
    # a pass may leave some as they are, and layers share their input
    if recipe.shares or any(name not in statistics for name in block_linears(model)):
        contract = check_blocks(model, torch.arange(SEQUENCES * TOKENS).view(SEQUENCES, TOKENS))
    left = {*recipe.left(model, weights), *contract.left}
    left |= set() if weights is None else block_linears(model).keys() - set(weights)
    return spread(model, statistics, Steps(recipe, weights, outputs=outputs), budget, contract, progress, left)


@step("budget")
def spread(
    model: nn.Module,
    statistics: Mapping[str, InputStatistics],
    steps: Steps,
    budget: Budget,
    contract: Contract,
    progress: bool = True,
    left: Container[str] = (),
    processes: Processes = ALONE,
    owners: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """`plan_ranks` of settings that were checked, with the steps of a pass. left: layers that stay as they are.

    Layers that share A are one to the budget; what they save by it is spent on rank.
    contract: of the model. processes: that look at the layers that they own each.
    """
    recipe, nats, owners = steps.recipe, budget.objective == "nats", owners or {}
    names = block_linears(model)
    chosen = [name for name in names if name not in left and re.search(budget.only, name)]
    groups = {one[0]: one for one in sharing(chosen, contract, recipe.shares)}
    not_here = {name for name in names if name in left or owners.get(name, 0) != processes.rank}
    with processes.agree():
        own = layer_spectra(
            model, statistics, recipe, budget.maximum, progress, steps, not_here, nats, list(groups.values())
        )
    found = {name: layer for part in processes.gather(own) for name, layer in part.items()}
    layers = {name: found[name] for name in names if name in found}
    apart = sum(sum(names[name].weight.shape) for one in layers for name in groups.get(one, (one,)))
    together = sum(one.in_features + one.out_features for one in layers.values())
    ranks = allocate_ranks(layers, recipe.rank * apart / together if apart != together else recipe.rank, budget)
    return {name: rank for one, rank in ranks.items() for name in groups.get(one, (one,))}


@torch.no_grad()
def layer_spectra(
    model: nn.Module,
    statistics: Mapping[str, InputStatistics],
    recipe: Recipe,
    maximum: int | None = None,
    progress: bool = True,
    steps: Steps | None = None,
    left: Container[str] = (),
    nats: bool = False,
    groups: Sequence[Sequence[str]] = (),
) -> dict[str, LayerSpectrum]:
    """Module name -> what `allocate_ranks` needs to know of the layer, for budgets of any size.

    maximum: the highest rank that a budget may give, which spares time in large layers; None: that of the layer.
    steps:   as for `compress_model`. The rank of the recipe does not matter.
    left:    names of layers that stay as they are beside those that the recipe leaves (`Contract.left`).
    nats:    spectra of `eora_fisher` in nats a token, from the gradients that `steps` holds, and not of output errors.
    groups:  names of layers that share A: they are one, by the name of the first, with the sum of relative errors.
    Raises EoraLabError when a layer has no statistics.
    """
    steps = steps or Steps(recipe)
    chosen = recipe.ranks(model, recipe.left(model, steps.weights))
    names = [name for name in chosen if name not in left and (steps.weights is None or name in steps.weights)]
    layers = {}
    together = {name: list(one) for one in groups for name in one}
    units = list(dict.fromkeys(tuple(n for n in together.get(name, [name]) if n in names) for name in names))
    for unit in each(units, "spectra", "layer", progress):
        if unit[0] not in statistics:
            raise EoraLabError(f"{unit[0]}: no statistics")
        weights = [linear_at(model, name).weight for name in unit]
        measured = statistics[unit[0]]
        usable = measured.or_identity(recipe.held_out > 0)
        highest = min(size for weight in weights for size in (*weight.shape, maximum) if size is not None)
        with naming(" and ".join(unit)):
            pairs = zip(unit, weights, strict=True)
            error = stacked([residual(one, steps.compress(name, one.float(), usable)) for name, one in pairs])
            # in nats as measured: few tokens are no reason to count an input as if it were of size one
            metric, method = (measured, "eora_fisher") if nats else (usable, "eora")
            method = "qera_approx" if metric.diagonal and not nats else method
            rows = grouped(method, unit, weights, metric, steps.outputs).rows
            spectrum = solve_in_rows(method, error, metric, highest, rows)[0].spectrum
            if isinstance(rows, OutputStatistics):
                spectrum = spectrum / 2
                rows.forget()
        signal = 1.0 if len(unit) > 1 else output_energy(weights[0].float(), usable.metric)
        lowest = highest if len(unit) > 1 else None
        layers[unit[0]] = LayerSpectrum(spectrum.cpu(), signal, error.shape[0], error.shape[1], lowest)
    return layers
