"""What HQQ stores: integer codes on a grid per group, with zero points that are no integers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eora_lab.compress.packing import pack, unpack
from eora_lab.compress.storage import Compressed, Lattice


@dataclass(frozen=True)
class HqqWeight(Compressed):
    """W^[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g], g = i // group_size, where all groups are of one size.

    Difference and product are rounded to the type of scales and zeros, as the library hqq has it.
    """

    kind: ClassVar = "hqq"
    whole: ClassVar = ("layout",)

    codes: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    zeros: Float[Tensor, "out groups"]
    bits: int

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return self.codes.shape

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight that a matrix product sees."""
        codes = self.codes.unflatten(1, (self.scales.shape[1], -1)).to(self.scales.dtype)
        return codes.sub_(self.zeros[..., None]).mul_(self.scales[..., None]).flatten(1).to(dtype)

    def lattice(self) -> Lattice:
        """What its codes stand for, but for rounding."""
        scales, groups = self.scales.float(), self.scales.shape[1]
        group = torch.arange(groups, device=scales.device).repeat_interleave(self.shape[1] // groups)
        return Lattice(-self.zeros.float() * scales, scales, group, 2**self.bits - 1)

    def with_codes(self, codes: UInt8[Tensor, "out in"]) -> "HqqWeight":
        """The same with other codes."""
        return replace(self, codes=codes)

    def state_dict(self) -> dict[str, Tensor]:
        """Packed tensors, ready for safetensors. A row of one is a row of the weight, but for "layout"."""
        layout = torch.tensor([self.shape[1], self.bits])
        return {"codes": pack(self.codes, self.bits), "scales": self.scales, "zeros": self.zeros, "layout": layout}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "HqqWeight":
        """The inverse of `state_dict`, also of the same rows of its tensors. Raises KeyError when one is missing."""
        in_features, bits = state["layout"].tolist()
        return cls(unpack(state["codes"], bits, in_features), state["scales"], state["zeros"], bits)
