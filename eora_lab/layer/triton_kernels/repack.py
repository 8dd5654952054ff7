"""From the stored form of a compressed layer to what the kernel reads, once, when the layer is loaded.

Codes are packed anew (`packing`), some rows at a time; scales become float32, offsets are kept as they are stored. The
low-rank paths lie beside them, so that another path leaves the packed weight as it is.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from eora_lab.compress import Compressed, GridWeight
from eora_lab.errors import EoraLabError
from eora_lab.layer.triton_kernels.packing import TILE, empty_planes, pack_into
from eora_lab.layer.triton_kernels.ptx import PLANES

TENSORS = ("planes", "scales", "offsets", "A", "Bt", "tiles", "bias", "order")  # of a FusedWeight, in order
Path = tuple[Float[Tensor, "_ in"], Float[Tensor, "out _"]]  # A and B of a low-rank path; ranks may differ


@dataclass(frozen=True)
class FusedWeight:
    """One layer, or several that read the same input, as the kernel reads it. K, N: padded in_, out_features.

    A, Bt: of one path, or of several of which each row of x takes one; all are padded with zeros to the same rank.
    tiles: for each 128 packed columns: its first row of A, its rank, its first and its last + 1 output column.
    order: the input channel that comes i-th, or None: then they are in place.
    group: channels that share a scale (16, 32, 64 or 128), or 0: one scale a row.
    """

    planes: Shaped[Tensor, "*experts words N"]  # int16
    scales: Float[Tensor, "*experts groups N"]  # float32
    offsets: UInt8[Tensor, "*experts groups N"] | Float[Tensor, "*experts groups N"]
    A: Float[Tensor, "paths rank in"]
    Bt: Float[Tensor, "paths tile_rank N"]
    tiles: Shaped[Tensor, "tiles 4"]  # int32
    bias: Float[Tensor, "*experts N"] | None
    order: Shaped[Tensor, " in"] | None
    bits: int
    group: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def in_features(self) -> int:
        """Channels of x."""
        return self.A.shape[2]

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

    def with_paths(self, paths: Sequence[Path]) -> "FusedWeight":
        """The same weight, of one layer, with other low-rank paths; which one a row takes is said at the call.

        Raises EoraLabError where a path holds numbers that its dtype does not.
        """
        dtype, device = self.A.dtype, self.A.device
        rank = max(len(A) for A, _ in paths)
        stacked_A = torch.zeros(len(paths), rank, self.in_features, dtype=dtype, device=device)
        stacked_B = torch.zeros(len(paths), rank, self.planes.shape[-1], dtype=dtype, device=device)
        for i, (A, B) in enumerate(paths):
            stacked_A[i, : len(A)] = A if self.order is None else A.to(device)[:, self.order]
            stacked_B[i, : len(A), : len(B)] = B.T
        if not (stacked_A.isfinite().all() and stacked_B.isfinite().all()):
            raise EoraLabError(f"a low-rank path does not fit into {str(dtype).removeprefix('torch.')}: use bfloat16")
        tiles = self.tiles.clone()
        tiles[:, 1] = rank
        return replace(self, A=stacked_A, Bt=stacked_B, tiles=tiles, ranks=(rank,))


def why_not_grid(
    bits: int,
    groups: int,
    group_size: int,
    in_features: int,
    group_index: Int[Tensor, " in"] | None,
    dtype: torch.dtype,
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
    if group_index is None:
        if -(-in_features // group_size) != groups:
            return f"{in_features} channels in groups of {group_size} are not {groups} groups"
        return None
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
    groups, channels = weight.scales.shape[1], weight.shape[1]
    return why_not_grid(weight.bits, groups, weight.group_size, channels, weight.g_idx, dtype)


def fused_weight(
    compressed: Compressed,
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None = None,
    dtype: torch.dtype = torch.float16,
) -> FusedWeight:
    """A layer of a compressed weight, for x of a dtype, float16 or bfloat16; A, B and bias are cast to it.

    Raises EoraLabError on what the kernel cannot read (`why_not_fused`).
    """
    return fused_rows([compressed], A, B, bias, dtype)


def fused_rows(
    parts: Iterable[Compressed],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None = None,
    dtype: torch.dtype = torch.float16,
) -> FusedWeight:
    """`fused_weight` of a weight in parts, whole tiles of rows one after another, so that few are unpacked at a time.

    A weight that its 2:4 mask drops is packed as the zero point, a code.
    """
    (out_features, rank), in_features = B.shape, A.shape[1]
    start, scales, offsets = 0, [], []
    for part in parts:
        if reason := why_not_fused(part, dtype):
            raise EoraLabError(f"the fused kernel cannot take this layer: {reason}")
        assert isinstance(part, GridWeight)
        if not start:
            first, order = part, order_of(part)
            planes = empty_planes(out_features, in_features, part.bits, part.codes.device)
        codes = part.codes
        if part.mask is not None:
            codes = torch.where(part.mask, codes, part.offsets[:, group_of_channel(part)])
        pack_into(planes, start, codes if order is None else codes[:, order], part.bits)
        scales.append(part.scales.float())
        offsets.append(part.offsets)
        start += len(codes)
    groups, (size, bits), columns = first.scales.shape[1], (first.group_size, first.bits), planes.shape[1]
    group = 0 if groups == 1 else math.gcd(size, 128)
    block = 16 * PLANES[bits]
    padded = -(-in_features // block) * block // group if group else 1

    def grids(rows: list[Tensor]) -> Tensor:  # (out, groups) -> (groups, N), padded
        whole = torch.cat(rows).repeat_interleave(size // group if group else 1, 1)
        pad = 0, padded - whole.shape[1], 0, columns - out_features
        return torch.nn.functional.pad(whole, pad).T.contiguous()

    device = planes.device
    starts = range(0, out_features, TILE)
    tiles = [(0, rank, start, min(start + TILE, out_features)) for start in starts]
    weight = FusedWeight(
        planes=planes,
        scales=grids(scales),
        offsets=grids(offsets),
        A=torch.zeros(1, 0, in_features, dtype=dtype, device=device),
        Bt=torch.zeros(1, 0, columns, dtype=dtype, device=device),
        tiles=torch.tensor(tiles, dtype=torch.int32, device=device),
        bias=None if bias is None else torch.nn.functional.pad(bias.to(dtype), (0, columns - out_features)),
        order=None if order is None else order.to(device),
        bits=bits,
        group=group,
        out_features=(out_features,),
        ranks=(0,),
    )
    return weight.with_paths([(A, B)])


def group_of_channel(weight: GridWeight) -> Int[Tensor, " in"]:
    """The group of each input channel."""
    if weight.g_idx is not None:
        return weight.g_idx.long()
    return torch.arange(weight.shape[1], device=weight.codes.device) // weight.group_size


def order_of(weight: GridWeight) -> Int[Tensor, " in"] | None:
    """The channels in the order of their groups; None where they are in it."""
    if weight.g_idx is None or weight.scales.shape[1] == 1:
        return None
    order = weight.g_idx.long().argsort(stable=True)
    return None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
