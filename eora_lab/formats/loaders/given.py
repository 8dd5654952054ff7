"""An adapter as a loader meets it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from eora_lab.formats.fused import Fused, Shapes


@dataclass(frozen=True)
class Given:
    """A PEFT adapter, of which the plain damage is named elsewhere.

    config:   adapter_config.json.
    ranks:    module name -> rank, of complete pairs of linears that the model has by that name.
    shapes:   of all linears in the decoder blocks, those of experts as the adapter has them.
    targets:  key -> parameter, of experts that are one entry (`parameter_targets`).
    together: the first of those, if there are any.
    fused:    linears that the model keeps for all experts in one tensor.
    written:  names of modules as they stand in the files, which peft may rename.
    model:    its modules alone, where they are known.
    """

    config: dict
    ranks: dict[str, int]
    shapes: Shapes
    targets: dict[str, str]
    together: str | None
    fused: Sequence[Fused]
    written: Sequence[str]
    model: nn.Module | None

    def apart(self) -> str | None:
        """The first linear of an expert that stands in the adapter by itself, if there is any."""
        names = (name for each in self.fused for parts in each.parts for name, _ in parts)
        return next((name for name in names if name in self.ranks), None) or next(
            (name for each in self.fused for name in each.names() if name in self.ranks), None
        )


def some(names: Sequence[str]) -> str:
    """The first of several, and how many there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
