"""W^ in full: what a format gives whose storage is not kept here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.compress.storage import Compressed


@dataclass(frozen=True)
class DenseWeight(Compressed):
    """The values of W^ themselves, in the type that they come in. Its bytes are not those of the format."""

    kind: ClassVar = "dense"
    whole: ClassVar = ()

    values: Float[Tensor, "out in"]

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of a value as it lies here."""
        return 8 * self.values.itemsize

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return self.values.shape

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight that a matrix product sees."""
        return self.values.to(dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """One tensor, ready for safetensors."""
        return {"values": self.values}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "DenseWeight":
        """The inverse of `state_dict`, also of some rows of it. Raises KeyError when it is missing."""
        return cls(state["values"])
