"""Layers that are compensated together: one alone, or those that read one input and share A."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.contract import Contract
from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compensate import needs_outputs
from eora_lab.compensate.shared import RelativeErrors, Rows, StackedOutputs
from eora_lab.errors import EoraLabError
from eora_lab.files import digest


@dataclass(frozen=True)
class Group:
    """Layers as one, row under row.

    names: full names. weights: (out, in) each, in the dtype of the model.
    rows: what errors are measured in on the side of the output; None: as they are.
    """

    names: tuple[str, ...]
    weights: tuple[Float[Tensor, "_ in"], ...]
    rows: Rows | None = None

    @property
    def sizes(self) -> list[int]:
        """Rows of each layer."""
        return [len(weight) for weight in self.weights]

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """All rows."""
        return stacked(self.weights)

    @property
    def key(self) -> str:
        """A name of its own."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]}+{digest(self.names[1:])[:12]}"

    def parts(self, matrix: Float[Tensor, "out columns"]) -> dict[str, Float[Tensor, "_ columns"]]:
        """Name -> the rows of that layer."""
        return dict(zip(self.names, matrix.split(self.sizes), strict=True))


def grouped(
    method: str,
    names: Sequence[str],
    weights: Sequence[Float[Tensor, "_ in"]],
    statistics: InputStatistics,
    outputs: Mapping[str, OutputStatistics],
) -> Group:
    """Layers that are compensated together, with what a method measures their errors in.

    statistics: of the input that they share. outputs: name -> those of its gradients, where there are any.
    """
    rows: Rows | None = None
    if needs_outputs(method):
        found = [outputs[name] for name in names if name in outputs]
        if len(found) == len(names):
            rows = found[0] if len(found) == 1 else StackedOutputs(found)
    elif len(names) > 1:
        signals = [output_energy(weight.float(), statistics.metric) for weight in weights]
        rows = RelativeErrors(signals, [len(weight) for weight in weights])
    return Group(tuple(names), tuple(weights), rows)


def stacked(parts: Sequence[Float[Tensor, "_ in"]]) -> Float[Tensor, "out in"]:
    """Rows of several matrices; of one alone, that one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def sharing(names: Iterable[str], contract: Contract, shares: bool) -> list[tuple[str, ...]]:
    """The layers that share A, in their order; each alone unless the recipe `shares`."""
    found: dict[str, list[str]] = {}
    for name in names:
        together = shares and name not in contract.apart
        found.setdefault(contract.shared.get(name, name) if together else name, []).append(name)
    return [tuple(one) for one in found.values()]


def with_ranks(
    names: Iterable[str], ranks: Mapping[str, int], contract: Contract, shares: bool
) -> list[tuple[tuple[str, ...], int]]:
    """The layers that share A, and their rank: the lowest that one of them can have. Those of rank 0 share nothing."""
    chosen = list(names)
    found = sharing([name for name in chosen if ranks.get(name, 0)], contract, shares)
    every = found + [(name,) for name in chosen if not ranks.get(name, 0)]
    every.sort(key=lambda one: chosen.index(one[0]))
    return [(one, min(ranks.get(name, 0) for name in one)) for one in every]


def check_ranks(ranks: Mapping[str, int], contract: Contract, shares: bool) -> None:
    """Raise EoraLabError where layers that share A are given several ranks."""
    for one in sharing([name for name, rank in ranks.items() if rank], contract, shares):
        for name in one[1:]:
            if ranks[name] != ranks[one[0]]:
                raise EoraLabError(
                    f"{one[0]} and {name} share A, and are given ranks {ranks[one[0]]} and {ranks[name]}: give both "
                    "the same, or leave shared_factors out"
                )
