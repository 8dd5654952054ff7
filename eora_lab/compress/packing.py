"""Bits on disk and in memory: rows of small integers as bit streams, masks as positions or bitmaps.

Every row starts on a byte of its own, so that a slice of the packed rows is a slice of the matrix.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

FEW_PER_FOUR = (1, 2)  # kept weights of every four for which 2-bit positions take no more room than a bitmap


def pack(codes: UInt8[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Codes of `bits` bits each, 1 to 8, as one little-endian bit stream a row, padded to whole bytes."""
    columns = codes.shape[1]
    words = F.pad(codes, (0, -columns % 8)).flatten().view(torch.int64)  # eight codes, a byte each
    words = words.view(len(codes), -(-columns // 8))
    for half in (1, 2, 4):  # two fields of `half` codes become one without a gap
        low = fields(half * bits, 16 * half)
        words = words & low | (words >> 8 * half & low) << half * bits
    packed = words[..., None].view(torch.uint8)[..., :bits].flatten(1)
    return packed[:, : -(-columns * bits // 8)].contiguous()


def unpack(packed: UInt8[Tensor, "rows bytes"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """The inverse of `pack`."""
    words = -(-columns // 8)
    packed = F.pad(packed, (0, words * bits - packed.shape[1]))
    codes = packed.new_zeros(len(packed), words, 8)
    codes[..., :bits] = packed.unflatten(1, (words, bits))
    spread = codes.view(torch.int64)
    for half in (4, 2, 1):
        low = fields(half * bits, 16 * half)
        high = (spread >> half * bits).bitwise_and_(low).bitwise_left_shift_(8 * half)
        spread.bitwise_and_(low).bitwise_or_(high)
    return codes.flatten(1)[:, :columns]


def fields(ones: int, period: int) -> int:
    """A 64-bit mask, as a signed integer: the lowest `ones` bits of every `period` bits."""
    mask = sum((2**ones - 1) << shift for shift in range(0, 64, period))
    return mask - 2**64 if mask >= 2**63 else mask


def pack_kept(
    matrix: Shaped[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"]
) -> Shaped[Tensor, "rows kept"]:
    """The kept entries of every row from left to right; zeros fill rows that keep fewer than the fullest one."""
    counts = mask.sum(1)
    kept = matrix.new_zeros(len(matrix), max(int(counts.max()), 1))
    kept[torch.arange(kept.shape[1], device=kept.device) < counts[:, None]] = matrix[mask]
    return kept


def unpack_kept(
    kept: Shaped[Tensor, "rows kept"], mask: Bool[Tensor, "rows columns"]
) -> Shaped[Tensor, "rows columns"]:
    """The inverse of `pack_kept`, zero where the mask is False."""
    place = mask.cumsum(1).sub_(1).clamp_min_(0)  # of every kept entry in its row
    return kept.gather(1, place).mul_(mask)


def pack_mask(mask: Bool[Tensor, "rows columns"]) -> tuple[UInt8[Tensor, "rows bytes"], int]:
    """What is kept, and n: 2-bit positions in every four weights, as sparse tensor cores read them, where all fours
    keep n of FEW_PER_FOUR; else one bit a weight, and n = 0."""
    if mask.numel() and mask.shape[1] % 4 == 0:
        fours = mask.unflatten(1, (-1, 4))
        n = int(fours[0, 0].sum())
        if n in FEW_PER_FOUR and bool((fours.sum(-1) == n).all()):
            positions = torch.arange(4, dtype=torch.uint8, device=mask.device).expand(fours.shape)[fours]
            return pack(positions.view(len(mask), -1), 2), n
    return pack(mask.to(torch.uint8), 1), 0


def unpack_mask(packed: UInt8[Tensor, "rows bytes"], n: int, columns: int) -> Bool[Tensor, "rows columns"]:
    """The inverse of `pack_mask`."""
    if not n:
        return unpack(packed, 1, columns).bool()
    positions = unpack(packed, 2, columns // 4 * n).unflatten(1, (-1, n))
    ones = torch.bitwise_left_shift(1, 8 * positions.int())  # a byte of a 32-bit word for every place
    return (ones[..., 0] | ones[..., -1]).contiguous().view(torch.bool)
