"""A whole model, compressed, with a compensation of any rank of any method: to be read, and measured, at each."""

import copy

import torch
from torch import nn

from eora_lab.measure.explore import Exploration
from eora_lab.model.structure import block_linears
from eora_lab.progress import each


class AtRank:
    """A copy of an explored model whose weights are W^ + B A, at the rank and by the method that is asked for.

    Every layer is solved once a method, at its highest rank, and cut after that: another rank costs a product a layer.
    Statistics are of the original model, so that what a layer is given does not hang on the rank of those before it.

    model: that of the exploration; it is not changed. progress: show how far the solving is.
    """

    def __init__(self, model: nn.Module, exploration: Exploration, progress: bool = True):
        self.exploration, self._progress = exploration, progress
        self._copy = copy.deepcopy(model)
        linears = block_linears(self._copy)
        self._linears = {layer: linears[layer] for layer in exploration.layers}
        self._solved: set[str] = set()

    @property
    def highest(self) -> int:
        """The highest rank of any layer; those that allow less are given what they allow."""
        return max(map(self.exploration.highest, self._linears))

    def prepare(self, method: str) -> None:
        """Solve all layers, unless this is done. Raises EoraLabError for an unknown method."""
        if method not in self._solved:
            for layer in each(self._linears, method, "layer", self._progress):
                self.exploration.answer(layer, method)
        self._solved.add(method)

    @torch.no_grad()
    def model(self, method: str, rank: int) -> nn.Module:
        """The model at this rank: the same object every time. Raises as `prepare`."""
        self.prepare(method)
        for layer, linear in self._linears.items():
            answer, W = self.exploration.answer(layer, method), self.exploration.weight(layer)
            left = torch.addmm(self.exploration.residual(layer), answer.B[:, :rank], answer.A[:rank], alpha=-1)
            linear.weight.copy_(W - left)
        return self._copy

    def path_bits(self, rank: int) -> float:
        """Bits that paths of this rank add to every compressed weight, their factors in 16 bits."""
        shapes = {layer: linear.weight.shape for layer, linear in self._linears.items()}
        factors = sum(min(rank, self.exploration.highest(layer)) * sum(shape) for layer, shape in shapes.items())
        return 16 * factors / sum(shape.numel() for shape in shapes.values())
