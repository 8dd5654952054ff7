"""Plan the ranks of a pass: one solve a layer gives the eigenvalues that any budget is spread by."""

from collections.abc import Mapping

import torch
from torch import nn

from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compensate import solve
from eora_lab.compensate.budget import Budget, LayerSpectrum, allocate_ranks
from eora_lab.compress import CompressedWeight
from eora_lab.errors import EoraLabError, naming
from eora_lab.model.structure import block_linears
from eora_lab.run.recipe import Recipe


def plan_ranks(
    model: nn.Module,
    statistics: dict[str, InputStatistics],
    recipe: Recipe,
    budget: Budget,
    progress: bool = True,
    weights: Mapping[str, CompressedWeight] | None = None,
) -> dict[str, int]:
    """Module name -> rank, for `compress_model(..., ranks=...)`, with recipe.rank as the average.

    statistics: of the original model, from `collect_statistics`. The model is not changed.
    weights:    as for `compress_model`.
    Raises EoraLabError when the recipe or the budget does not fit the model.
    """
    recipe.check(model, given=weights)
    layers = layer_spectra(model, statistics, recipe, budget.maximum, progress, weights)
    return allocate_ranks(layers, recipe.rank, budget)


@torch.no_grad()
def layer_spectra(
    model: nn.Module,
    statistics: dict[str, InputStatistics],
    recipe: Recipe,
    maximum: int | None = None,
    progress: bool = True,
    weights: Mapping[str, CompressedWeight] | None = None,
) -> dict[str, LayerSpectrum]:
    """Module name -> what `allocate_ranks` needs to know of the layer, for budgets of any size.

    maximum: the highest rank that a budget may give, which spares time in large layers; None: that of the layer.
    The others, and what is raised, as for `plan_ranks`; the rank of the recipe does not matter.
    """
    from tqdm.auto import tqdm

    recipe.check(model, {}, weights)
    names = [name for name in block_linears(model) if weights is None or name in weights]
    layers = {}
    for name in tqdm(names, desc="spectra", unit="layer", disable=not progress, leave=False):
        if name not in statistics:
            raise EoraLabError(f"{name}: no statistics")
        weight, usable = model.get_submodule(name).weight, statistics[name].or_identity(recipe.held_out > 0)
        highest = min(weight.shape) if maximum is None else min(*weight.shape, maximum)
        with naming(name):
            compressed = weights[name] if weights else recipe.compress(weight.float(), usable)
            residual = weight.float() - compressed.dense(weight.dtype).to(weight).float()
            spectrum = solve("eora", residual, usable, highest).spectrum
        signal = output_energy(weight.float(), usable.second_moment)
        layers[name] = LayerSpectrum(spectrum, signal, *weight.shape)
    return layers
