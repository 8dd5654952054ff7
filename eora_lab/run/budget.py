"""Spend a parameter budget where it removes most output error: a rank for every layer, from the eigenvalues alone.

This file does not import torch: commands show the settings of a budget before anything is computed.
"""

import heapq
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from eora_lab.errors import EoraLabError, check_pattern, settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerSpectrum:
    """What the budget needs to know of a layer."""

    spectrum: "torch.Tensor"  # (eigenvalues,), the loss that each rank removes, descending: E|D x|², or nats a token
    signal: float  # E|W x|², what relative errors are relative to
    out_features: int
    in_features: int
    highest: int | None = None  # rank, where that is lower than both


@settings
class Budget:
    """How a parameter budget is spread over layers."""

    objective: Literal["uniform", "relative", "absolute", "nats"] = "uniform"
    """uniform: the same rank everywhere; else the ranks that minimise the summed output error: relative to each layer's
    output, or absolute, or in nats, as what it adds to the model's loss (needs method eora_fisher)"""
    minimum: int = 0
    """lowest rank of a layer"""
    maximum: int | None = None
    """highest rank of a layer"""
    multiple: int = 8
    """ranks are multiples of this"""
    only: str = ""
    """regular expression; layers whose name it does not match get rank 0 and leave their share to the others"""

    def check(self) -> None:
        """Raise EoraLabError for bounds that are no multiples, or an expression that cannot be read."""
        if self.multiple < 1 or self.minimum % self.multiple or (self.maximum or 0) % self.multiple:
            raise EoraLabError(f"the lowest and the highest rank must be multiples of {self.multiple} (at least 1)")
        if self.minimum < 0 or (self.maximum is not None and self.maximum < self.minimum):
            raise EoraLabError(f"ranks of a budget go up, from 0 or more, not {self.minimum} to {self.maximum}")
        check_pattern(self.only)


def allocate_ranks(layers: dict[str, LayerSpectrum], average_rank: int | float, budget: Budget) -> dict[str, int]:
    """Rank of every layer that minimises the summed output error under a parameter budget.

    The budget is that of average_rank in every layer, average_rank (in + out) parameters each. Minimised is the sum of
    E|(R - B A) x|² (absolute), or the same over E|W x|² of each layer (relative), or of what the spectra are in (nats,
    where they are the halved ones of `eora_fisher`).

    Greedy: take the step that gains most per parameter, again and again. A layer's gains fall with its rank, as
    eigenvalues do, so the steps that greedy takes are the best ones of all layers together, and no other choice of the
    same number of parameters gains more. Only the last, unspent parameters (less than one step) can be off.
    Raises EoraLabError when the bounds and the budget contradict each other.
    """
    multiple = budget.multiple
    chosen = {name: layer for name, layer in layers.items() if re.search(budget.only, name)}
    if not chosen:
        raise EoraLabError(f"no layer matches {budget.only!r}; names are like {next(iter(layers))}")

    def cost(name: str, rank: int) -> int:
        return rank * (layers[name].in_features + layers[name].out_features)

    def limit(name: str) -> int:
        layer = layers[name]
        full = min(layer.in_features, layer.out_features, layer.highest or layer.in_features) // multiple * multiple
        return full if budget.maximum is None else min(full, budget.maximum)

    left = int(sum(cost(name, 1) for name in layers) * average_rank)
    ranks = dict.fromkeys(layers, 0)
    for name in chosen:
        if budget.minimum > limit(name):
            raise EoraLabError(f"the lowest rank {budget.minimum} is more than {name} can have: {limit(name)}")
        ranks[name] = budget.minimum
        left -= cost(name, budget.minimum)
    if left < 0:
        raise EoraLabError(f"rank {budget.minimum} in every layer is more than an average rank of {average_rank}")

    def priority(name: str) -> float:
        """Gain per parameter of the next step; for "uniform", the layer that is furthest behind."""
        if budget.objective == "uniform":
            return -float(ranks[name])
        gain = layers[name].spectrum[ranks[name] : ranks[name] + multiple].sum().item() / cost(name, multiple)
        return gain / (layers[name].signal or 1.0) if budget.objective == "relative" else gain

    steps = [(-priority(name), name) for name in chosen if ranks[name] + multiple <= limit(name)]
    heapq.heapify(steps)
    while steps:
        name = heapq.heappop(steps)[1]
        if cost(name, multiple) <= left:  # a layer that no longer fits drops out; one with fewer channels may still fit
            ranks[name] += multiple
            left -= cost(name, multiple)
            if ranks[name] + multiple <= limit(name):
                heapq.heappush(steps, (-priority(name), name))
    return ranks


def predicted_error(layers: dict[str, LayerSpectrum], ranks: dict[str, int]) -> float:
    """Mean over layers of the relative output error E|(R - B A) x|² / E|W x|² that EoRA leaves at these ranks.

    What lies beyond the end of a spectrum (see `LowRank`) is not counted.
    """
    left = [layer.spectrum[ranks[name] :].sum().item() / (layer.signal or 1.0) for name, layer in layers.items()]
    return sum(left) / len(left)


def factor_bytes(layers: dict[str, LayerSpectrum], ranks: dict[str, int]) -> int:
    """Bytes of A and B of all layers in 16 bits."""
    return sum(2 * rank * (layers[name].in_features + layers[name].out_features) for name, rank in ranks.items())
