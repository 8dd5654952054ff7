"""Plan the ranks of a pass: one solve a layer gives the eigenvalues that any budget is spread by."""

from collections.abc import Container, Mapping

import torch
from torch import nn

from eora_lab.calibrate.contract import SEQUENCES, TOKENS, check_blocks
from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.processes import ALONE, Processes
from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compensate import needs_outputs, solve
from eora_lab.compress import residual
from eora_lab.environment import step
from eora_lab.errors import EoraLabError, as_setting, naming
from eora_lab.model.structure import block_linears, linear_at
from eora_lab.progress import each
from eora_lab.run.budget import Budget, LayerSpectrum, allocate_ranks
from eora_lab.run.fit import Steps
from eora_lab.run.given import named_for
from eora_lab.run.recipe import Recipe


def given_ranks(ranks: Mapping) -> dict[str, int]:
    """Ranks as a caller gives them, module name -> rank. Raises EoraLabError for one that is no rank."""
    found = {str(name): as_setting(int, rank, f"the rank of {name}") for name, rank in ranks.items()}
    for name, rank in found.items():
        if rank < 0:
            raise EoraLabError(f"the rank of {name} must be 0 or more, not {rank}")
    return found


def check_budget(budget: Budget | None, recipe: Recipe) -> None:
    """Raise EoraLabError for a budget in nats where the method measures no gradients."""
    if budget and budget.objective == "nats" and not needs_outputs(recipe.method):
        raise EoraLabError("a budget in nats needs the gradients at every layer's output: use method eora_fisher")


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
    left: Container[str] = ()
    if any(name not in statistics for name in block_linears(model)):  # a pass may leave some as they are
        left = check_blocks(model, torch.arange(SEQUENCES * TOKENS).view(SEQUENCES, TOKENS)).left
    return spread(model, statistics, Steps(recipe, weights, outputs=outputs), budget, progress, left)


@step("budget")
def spread(
    model: nn.Module,
    statistics: Mapping[str, InputStatistics],
    steps: Steps,
    budget: Budget,
    progress: bool = True,
    left: Container[str] = (),
    processes: Processes = ALONE,
    owners: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """`plan_ranks` of settings that were checked, with the steps of a pass. left: layers that stay as they are.

    processes: that look at the layers that they own each.
    """
    recipe, nats, owners = steps.recipe, budget.objective == "nats", owners or {}
    names = block_linears(model)
    not_here = {name for name in names if name in left or owners.get(name, 0) != processes.rank}
    with processes.agree():
        own = layer_spectra(model, statistics, recipe, budget.maximum, progress, steps, not_here, nats)
    found = {name: layer for part in processes.gather(own) for name, layer in part.items()}
    layers = {name: found[name] for name in names if name in found}
    return allocate_ranks(layers, recipe.rank, budget)


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
) -> dict[str, LayerSpectrum]:
    """Module name -> what `allocate_ranks` needs to know of the layer, for budgets of any size.

    maximum: the highest rank that a budget may give, which spares time in large layers; None: that of the layer.
    steps:   as for `compress_model`. The rank of the recipe does not matter.
    left:    names of layers that stay as they are beside those that the recipe leaves (`Contract.left`).
    nats:    spectra of `eora_fisher` in nats a token, from the gradients that `steps` holds, and not of output errors.
    Raises EoraLabError when a layer has no statistics.
    """
    steps = steps or Steps(recipe)
    chosen = recipe.ranks(model, recipe.left(model, steps.weights))
    names = [name for name in chosen if name not in left and (steps.weights is None or name in steps.weights)]
    layers = {}
    for name in each(names, "spectra", "layer", progress):
        if name not in statistics:
            raise EoraLabError(f"{name}: no statistics")
        weight, usable = linear_at(model, name).weight, statistics[name].or_identity(recipe.held_out > 0)
        highest = min(weight.shape) if maximum is None else min(*weight.shape, maximum)
        with naming(name):
            error = residual(weight, steps.compress(name, weight.float(), usable))
            if nats:  # as measured: few tokens are no reason to count an input as if it were of size one
                outputs = steps.outputs.get(name)
                spectrum = solve("eora_fisher", error, statistics[name], highest, outputs).spectrum / 2
                if outputs:
                    outputs.forget()
            else:
                spectrum = solve("qera_approx" if usable.diagonal else "eora", error, usable, highest).spectrum
        signal = output_energy(weight.float(), usable.metric)
        layers[name] = LayerSpectrum(spectrum.cpu(), signal, *weight.shape)
    return layers
