"""What a compressor returns: integer codes on a grid per group, and how many bytes they take."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor


@dataclass(frozen=True)
class CompressedWeight:
    """W^[o, i] = (codes[o, i] - zero[o, g]) * scales[o, g], where g = i // group_size, or g_idx[i].

    codes:   integers in 0 .. 2^bits - 1.
    scales:  float16 or float32, stored as they are used.
    offsets: what places the grid. uint8: the zero point, an integer of `bits` bits. Else, in the dtype of scales: the
             weight of code 0, so that zero = -offset / scale.
    g_idx:   the group of every input channel, where groups are not equal runs of neighbours (GPTQ's desc_act).
    """

    codes: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    offsets: UInt8[Tensor, "out groups"] | Float[Tensor, "out groups"]
    bits: int
    g_idx: Int32[Tensor, " in"] | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight that a matrix product sees."""
        if self.g_idx is not None:
            group = self.g_idx.long()
            zeros = zero_points(self.scales, self.offsets)[:, group]
            return ((self.codes.float() - zeros) * self.scales.float()[:, group]).to(dtype)
        codes = self.codes.unflatten(1, (self.scales.shape[1], -1)).float()
        dense = (codes - zero_points(self.scales, self.offsets)[..., None]) * self.scales.float()[..., None]
        return dense.flatten(1).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes as stored: codes and zero points at `bits` bits each, all else in full."""
        parts = (self.codes, self.scales, self.offsets, *([] if self.g_idx is None else [self.g_idx]))
        return sum(-(-t.numel() * self.bits // 8) if t.dtype == torch.uint8 else t.nbytes for t in parts)

    def state_dict(self) -> dict[str, Tensor]:
        """Packed tensors, ready for safetensors."""
        state = {
            "codes": pack(self.codes, self.bits),
            "offsets": pack(self.offsets, self.bits) if self.offsets.dtype == torch.uint8 else self.offsets,
            "scales": self.scales,
            "shape": torch.tensor([*self.codes.shape, self.bits]),
        }
        return state if self.g_idx is None else state | {"g_idx": self.g_idx}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "CompressedWeight":
        """The inverse of `state_dict`."""
        out_features, in_features, bits = state["shape"].tolist()
        scales, offsets = state["scales"], state["offsets"]
        if offsets.dtype == torch.uint8:
            offsets = unpack(offsets, bits, scales.numel()).view(scales.shape)
        codes = unpack(state["codes"], bits, out_features * in_features).view(out_features, in_features)
        return cls(codes, scales, offsets, bits, state.get("g_idx"))


def zero_points(
    scales: Float[Tensor, "out groups"], offsets: UInt8[Tensor, "out groups"] | Float[Tensor, "out groups"]
) -> Float[Tensor, "out groups"]:
    """The code, not always a whole one, that stands for a weight of zero."""
    return offsets.float() if offsets.dtype == torch.uint8 else -offsets.float() / scales.float()


def pack(codes: UInt8[Tensor, "..."], bits: int) -> UInt8[Tensor, " bytes"]:
    """Codes of `bits` bits each as one little-endian bit stream, padded to whole bytes."""
    planes = np.unpackbits(codes.cpu().numpy().reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> UInt8[Tensor, " count"]:
    """The inverse of `pack`."""
    stream = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(count, bits), axis=1, bitorder="little").reshape(-1))
