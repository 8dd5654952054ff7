"""From the stored form of a compressed layer to the layout that the kernel reads, once, when the layer is loaded.

Codes are packed along the input channels and lie contiguous along the output channels, so every load is coalesced.
A block is 8 planes (4 bits) or 16 planes (3 bits) of 16 channels. Row i of lane L of a block is a row of 16-bit words
with the codes of channels 16 p + i for the planes p of that lane (see `ptx.unpack_text`): exactly `bits` bits a weight.
K is padded with zeros to whole blocks, N to whole tiles of 128. Scales and offsets are kept as they are stored.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from eora_lab.compress import Compressed, GridWeight
from eora_lab.errors import EoraLabError
from eora_lab.layer.triton_kernels.ptx import LANES, PLANES

TENSORS = ("planes", "scales", "offsets", "A", "Bt", "tiles", "bias", "order")  # of a FusedWeight, in order
TILE = 128  # columns that share a row of `tiles`; every BLOCK_N divides it


@dataclass(frozen=True)
class FusedWeight:
    """One layer, or several that read the same input, as the kernel reads it. K, N: padded in_, out_features.

    tiles: for each 128 packed columns: its first row of A, its rank, its first and its last + 1 output column.
    order: the input channel that comes i-th, or None: then they are in place.
    group: channels that share a scale (16, 32, 64 or 128), or 0: one scale a row.
    """

    planes: Shaped[Tensor, "words N"]  # int16
    scales: Float[Tensor, "groups N"]
    offsets: UInt8[Tensor, "groups N"] | Float[Tensor, "groups N"]
    A: Float[Tensor, "rank in"]
    Bt: Float[Tensor, "tile_rank N"]
    tiles: Shaped[Tensor, "tiles 4"]  # int32
    bias: Float[Tensor, " N"] | None
    order: Shaped[Tensor, " in"] | None
    bits: int
    group: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def in_features(self) -> int:
        """Channels of x."""
        return self.A.shape[1]

    def segments(self) -> Iterator[tuple[slice, slice, slice]]:
        """Each merged layer's packed columns (without padding), output columns and rows of A."""
        packed = out = rank = 0
        for columns, ranks in zip(self.out_features, self.ranks, strict=True):
            yield slice(packed, packed + columns), slice(out, out + columns), slice(rank, rank + ranks)
            packed, out, rank = packed + -(-columns // TILE) * TILE, out + columns, rank + ranks

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are."""
        return {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}

    def numbers(self) -> dict[str, Any]:
        """The fields that are no tensors."""
        return {"bits": self.bits, "group": self.group, "out_features": self.out_features, "ranks": self.ranks}

    def to(self, device: torch.device | str) -> "FusedWeight":
        """The same on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)


def pack_planes(codes: UInt8[Tensor, "out in"], bits: int) -> Shaped[Tensor, "words N"]:
    """Codes in the kernel's layout, padded with zeros."""
    out_features, in_features = codes.shape
    block = 16 * PLANES[bits]
    pad = -in_features % block, -out_features % TILE
    planes = torch.nn.functional.pad(codes, (0, pad[0], 0, pad[1])).T.to(torch.int32)
    planes = planes.reshape(-1, PLANES[bits], 16, planes.shape[1])  # (blocks, planes, 16, N)
    per_lane = 16 // bits
    lanes = []
    for lane in range(LANES[bits]):
        word = torch.zeros_like(planes[:, 0])
        for f in range(per_lane):
            word |= planes[:, lane * per_lane + f] << (bits * f)
        if bits == 3:
            word |= ((planes[:, 15] >> lane) & 1) << 15
        lanes.append(word)
    words = torch.stack(lanes, 1).reshape(-1, planes.shape[-1])
    return torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)


def unpack_planes(
    words: Shaped[Tensor, "words N"], bits: int, out_features: int, in_features: int
) -> UInt8[Tensor, "out in"]:
    """The inverse of `pack_planes`."""
    lanes = (words.to(torch.int32) & 0xFFFF).reshape(-1, LANES[bits], 16, words.shape[1])
    planes = [(lanes[:, lane] >> (bits * f)) & (2**bits - 1) for lane in range(LANES[bits]) for f in range(16 // bits)]
    if bits == 3:
        planes.append(sum((lanes[:, lane] >> 15) << lane for lane in range(3)))
    codes = torch.stack(planes, 1).reshape(-1, words.shape[1])  # (K, N)
    return codes[:in_features, :out_features].T.to(torch.uint8)


def why_not_grid(
    bits: int, groups: int, group_size: int, group_index: Int[Tensor, " in"] | None, dtype: torch.dtype
) -> str | None:
    """What the kernel cannot read of a grid, or None."""
    if bits not in PLANES:
        return f"it reads 3 or 4 bits, not {bits}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if groups == 1:
        return None
    if group_size % 16:
        return f"it needs a group size divisible by 16, not {group_size}"
    if group_index is not None:
        counts = torch.bincount(group_index.long(), minlength=groups)
        if (counts[:-1] != group_size).any() or counts[-1] > group_size:
            return "it needs groups of equal size"
    return None


def why_not_fused(weight: Compressed, dtype: torch.dtype) -> str | None:
    """What the kernel cannot read of a weight, of which one row is enough, for x of a dtype; or None."""
    if not isinstance(weight, GridWeight):
        return f"it reads grids, not a weight that is stored as {weight.kind}"
    if weight.mask is not None and weight.offsets.dtype != torch.uint8:
        return "it reads a mask with integer zero points only"
    return why_not_grid(weight.bits, weight.scales.shape[1], weight.group_size, weight.g_idx, dtype)


def repack(
    codes: UInt8[Tensor, "out in"],
    scales: Float[Tensor, "out groups"],
    offsets: UInt8[Tensor, "out groups"] | Float[Tensor, "out groups"],
    bits: int,
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None = None,
    group_index: Int[Tensor, " in"] | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float16,
) -> FusedWeight:
    """Pack one layer. W^[o, i] = codes[o, i] scales[o, g] + offsets[o, g]; uint8 offsets are zero points instead.

    group_index: the group g of each channel (act-order); without it g = i // group_size.
    group_size: needed only where the last group is shorter than the others.
    dtype: float16 or bfloat16, what x will be; A, B and bias are cast to it.
    Raises EoraLabError on bits, groups or a dtype that the kernel cannot read.
    """
    out_features, in_features = codes.shape
    group_size = group_size or in_features // scales.shape[1]
    if reason := why_not_grid(bits, scales.shape[1], group_size, group_index, dtype):
        raise EoraLabError(f"the fused kernel cannot take this layer: {reason}")
    order = None
    if group_index is not None and scales.shape[1] > 1:
        order = group_index.argsort(stable=True)
        if (order == torch.arange(in_features, device=order.device)).all():
            order = None
        else:
            codes, A = codes[:, order], A[:, order]
    group = 0 if scales.shape[1] == 1 else math.gcd(group_size, 128)
    planes = pack_planes(codes, bits)
    if group:
        scales, offsets = (t.repeat_interleave(group_size // group, 1) for t in (scales, offsets))
    block = 16 * PLANES[bits]
    groups = -(-in_features // block) * block // group if group else 1

    def columns(matrix: Tensor, rows: int) -> Tensor:  # (out, rows) -> (rows, N), padded
        pad = 0, rows - matrix.shape[1], 0, planes.shape[1] - out_features
        return torch.nn.functional.pad(matrix, pad).T.contiguous()

    rank = A.shape[0]
    return FusedWeight(
        planes=planes,
        scales=columns(scales, groups),
        offsets=columns(offsets, groups),
        A=A.to(dtype).contiguous(),
        Bt=columns(B.to(dtype), rank),
        tiles=tile_table(B),
        bias=None if bias is None else columns(bias.to(dtype)[:, None], 1)[0],
        order=order,
        bits=bits,
        group=group,
        out_features=(out_features,),
        ranks=(rank,),
    )


def tile_table(B: Float[Tensor, "out rank"]) -> Shaped[Tensor, "tiles 4"]:
    """`tiles` of a layer by itself."""
    out_features, rank = B.shape
    tiles = [(0, rank, start, min(start + TILE, out_features)) for start in range(0, out_features, TILE)]
    return torch.tensor(tiles, dtype=torch.int32, device=B.device)


def fused_weight(
    compressed: Compressed,
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None = None,
    dtype: torch.dtype = torch.float16,
) -> FusedWeight:
    """`repack` of a compressed weight. A weight that its 2:4 mask drops is packed as the zero point, a code.

    Raises EoraLabError on what the kernel cannot read (`why_not_fused`).
    """
    if reason := why_not_fused(compressed, dtype):
        raise EoraLabError(f"the fused kernel cannot take this layer: {reason}")
    assert isinstance(compressed, GridWeight)
    codes, scales, offsets = compressed.codes, compressed.scales, compressed.offsets
    mask, index, group_size = compressed.mask, compressed.g_idx, compressed.group_size
    if mask is not None:
        group = torch.arange(codes.shape[1], device=codes.device) // group_size if index is None else index.long()
        codes = torch.where(mask, codes, offsets[:, group])
    return repack(codes, scales, offsets, compressed.bits, A, B, bias, index, group_size, dtype)
