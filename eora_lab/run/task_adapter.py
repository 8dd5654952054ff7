"""A new adapter for a compressed model that stays as it is: the same W^, compensated for other texts (for a task)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from eora_lab.compress import Compressed
from eora_lab.errors import EoraLabError
from eora_lab.formats.names import Factors
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.model.structure import block_linears
from eora_lab.run.adapters import compensated_layers
from eora_lab.run.pipeline import compress_model
from eora_lab.run.recipe import Recipe
from eora_lab.run.report import Report
from eora_lab.text.batches import Batches


def solve_adapter(
    model: nn.Module,
    original: nn.Module,
    batches: Batches,
    recipe: Recipe | None = None,
    progress: bool = True,
) -> Factors:
    """Compensate W - W^ in every layer for the given texts: module name -> (A, B). `model` is left with it in use.

    model:    compressed, from `load_run`.
    original: the model that it was made from. It runs block by block, and is as before afterwards.
    batches:  calibration token ids, as for `compress_model`.
    recipe:   its settings of the low-rank path and of the pass; those of the compressor do not matter.
    Raises EoraLabError when the models do not match, or a rank does not fit a layer.
    """
    return solve_and_report(model, original, batches, recipe, progress)[0]


@torch.no_grad()
def solve_and_report(
    model: nn.Module,
    original: nn.Module,
    batches: Batches,
    recipe: Recipe | None = None,
    progress: bool = True,
) -> tuple[Factors, Report]:
    """The same, and the report of the pass."""
    recipe = replace(recipe or Recipe(), rounds=1, preserve=False)
    layers, dense = compensated_layers(model), block_linears(original)
    for name, layer in layers.items():
        if name not in dense or tuple(dense[name].weight.shape) != (layer.out_features, layer.in_features):
            raise EoraLabError(f"{name} of the compressed model is not in the original one, or of another size there")
    try:
        report = compress_model(original, batches, recipe, weights=_Weights(layers), progress=progress)
        stored = {name: layer.factors for name, layer in compensated_layers(original).items()}
    finally:
        for name, linear in dense.items():
            original.set_submodule(name, linear)
    for name, layer in layers.items():
        layer.set_factors(stored[name])
    return {name: factors.dense() for name, factors in stored.items()}, report


class _Weights(Mapping[str, Compressed]):
    """Module name -> W^ of a compressed model, unpacked when it is asked for."""

    def __init__(self, layers: Mapping[str, CompensatedLinear]):
        self._layers = layers

    def __getitem__(self, name: str) -> Compressed:
        return self._layers[name].compressed

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
