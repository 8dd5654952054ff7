"""What a quantiser returns: integer codes on a grid per group, and how many bytes they take."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Shaped, UInt8
from torch import Tensor

from eora_lab.compress.packing import pack, pack_kept, pack_mask, unpack, unpack_kept, unpack_mask
from eora_lab.compress.storage import Compressed, Lattice


@dataclass(frozen=True)
class GridWeight(Compressed):
    """W^[o, i] = (codes[o, i] - zero[o, g]) * scales[o, g] where mask[o, i], else 0; g = i // group_size or g_idx[i].

    codes:   integers in 0 .. 2^bits - 1; 0 where the mask is False.
    scales:  float16 or float32, stored as they are used.
    offsets: what places the grid. uint8: the zero point, an integer of `bits` bits. Else, in the dtype of scales: the
             weight of code 0, so that zero = -offset / scale.
    mask:    the weights that were not pruned; None: all.
    group_size: channels that share a grid; the last group may be shorter. 0: all are of the same size.
    g_idx:   the group of every input channel, where groups are not runs of neighbours (GPTQ's desc_act).
    """

    kind: ClassVar = "grid"
    whole: ClassVar = ("layout", "g_idx")

    codes: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    offsets: UInt8[Tensor, "out groups"] | Float[Tensor, "out groups"]
    bits: int
    mask: Bool[Tensor, "out in"] | None = None
    group_size: int = 0
    g_idx: Int32[Tensor, " in"] | None = None

    def __post_init__(self):
        if not self.group_size:
            object.__setattr__(self, "group_size", self.codes.shape[1] // max(self.scales.shape[1], 1))

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return self.codes.shape

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight that a matrix product sees."""
        zero, scale = zero_points(self.scales, self.offsets), self.scales.float()
        if self.g_idx is not None:
            group = self.g_idx.long()
            dense = self.codes.float().sub_(zero[:, group]).mul_(scale[:, group])
        else:
            dense = in_groups(self.codes, self.group_size).float().sub_(zero[..., None]).mul_(scale[..., None])
            dense = dense.flatten(1)[:, : self.shape[1]]
        if self.mask is not None:
            dense = dense * self.mask
        return dense.to(dtype)

    def lattice(self) -> Lattice:
        """What its codes stand for."""
        scales = self.scales.float()
        group = torch.arange(self.shape[1]) // self.group_size if self.g_idx is None else self.g_idx.long()
        origin = -zero_points(self.scales, self.offsets) * scales
        return Lattice(origin, scales, group.to(scales.device), 2**self.bits - 1, self.mask)

    def with_codes(self, codes: UInt8[Tensor, "out in"]) -> "GridWeight":
        """The same with other codes; what is pruned stays so."""
        return replace(self, codes=codes if self.mask is None else codes * self.mask)

    def state_dict(self) -> dict[str, Tensor]:
        """Packed tensors, ready for safetensors. A row of one is a row of the weight, but for those of `whole`."""
        codes, more, positions = self.codes, {}, 0
        if self.mask is not None:
            codes = pack_kept(codes, self.mask)
            more["mask"], positions = pack_mask(self.mask)
        if self.g_idx is not None:
            more["g_idx"] = self.g_idx
        return more | {
            "codes": pack(codes, self.bits),
            "offsets": pack(self.offsets, self.bits) if self.offsets.dtype == torch.uint8 else self.offsets,
            "scales": self.scales,
            "layout": torch.tensor([self.shape[1], self.scales.shape[1], self.group_size, self.bits, positions]),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "GridWeight":
        """The inverse of `state_dict`, also of the same rows of its tensors. Raises KeyError when one is missing."""
        in_features, groups, group_size, bits, positions = state["layout"].tolist()
        scales, offsets = state["scales"], state["offsets"]
        if offsets.dtype == torch.uint8:
            offsets = unpack(offsets, bits, groups)
        mask = unpack_mask(state["mask"], positions, in_features) if "mask" in state else None
        if mask is None:
            codes = unpack(state["codes"], bits, in_features)
        else:
            codes = unpack_kept(unpack(state["codes"], bits, state["codes"].shape[1] * 8 // bits), mask)
        return cls(codes, scales, offsets, bits, mask, group_size, state.get("g_idx"))


def in_groups(matrix: Shaped[Tensor, "out in"], group_size: int) -> Shaped[Tensor, "out groups group_size"]:
    """A matrix with its columns in groups; zeros fill a last group that is shorter."""
    return F.pad(matrix, (0, -matrix.shape[1] % group_size)).unflatten(1, (-1, group_size))


def zero_points(
    scales: Float[Tensor, "out groups"], offsets: UInt8[Tensor, "out groups"] | Float[Tensor, "out groups"]
) -> Float[Tensor, "out groups"]:
    """The code, not always a whole one, that stands for a weight of zero."""
    return offsets.float() if offsets.dtype == torch.uint8 else -offsets.float() / scales.float()
