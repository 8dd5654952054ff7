"""What a pruner returns when nothing is quantised: the kept weights in float16, and which they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float16
from torch import Tensor

from eora_lab.compress.packing import pack_kept, pack_mask, unpack_kept, unpack_mask
from eora_lab.compress.storage import Compressed


@dataclass(frozen=True)
class SparseWeight(Compressed):
    """W^[o, i] = values[o, i] where mask[o, i], else 0. The same interface as `GridWeight`."""

    kind: ClassVar = "sparse"
    whole: ClassVar = ("layout",)

    values: Float16[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    bits: int = field(default=16, init=False)  # of a kept weight

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return self.values.shape

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight that a matrix product sees."""
        return (self.values * self.mask).to(dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Packed tensors, ready for safetensors. A row of a tensor is a row of the weight, except in "layout"."""
        packed, positions = pack_mask(self.mask)
        layout = torch.tensor([self.shape[1], positions])
        return {"values": pack_kept(self.values, self.mask), "mask": packed, "layout": layout}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "SparseWeight":
        """The inverse of `state_dict`, also of the same rows of its tensors. Raises KeyError when one is missing."""
        in_features, positions = state["layout"].tolist()
        mask = unpack_mask(state["mask"], positions, in_features)
        return cls(unpack_kept(state["values"], mask), mask)
