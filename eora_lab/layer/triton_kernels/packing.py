"""Codes in the order of the kernel: along the input channels packed, along the output channels side by side.

A block is 8 planes (4 bits) or 16 planes (3 bits) of 16 channels. Row i of lane L of a block is a row of 16-bit words
with the codes of channels 16 p + i for the planes p of that lane (see `ptx.unpack_text`): exactly `bits` bits a weight.
K is padded with zeros to whole blocks, N to whole tiles of 128, so every load is coalesced.
"""

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from eora_lab.layer.triton_kernels.ptx import LANES, PLANES

TILE = 128  # columns that share a row of `FusedWeight.tiles`; every BLOCK_N divides it
AT_ONCE = 2**22  # weights that are integers of 32 bits at the same time


def rows_at_once(in_features: int) -> int:
    """Rows of W^ that are unpacked at the same time while a layer is packed: whole tiles."""
    return max(AT_ONCE // in_features // TILE, 1) * TILE


def empty_planes(out_features: int, in_features: int, bits: int, device: torch.device) -> Shaped[Tensor, "words N"]:
    """Room for a layer, all codes 0."""
    blocks = -(-in_features // (16 * PLANES[bits]))
    columns = -(-out_features // TILE) * TILE
    return torch.zeros(blocks * LANES[bits] * 16, columns, dtype=torch.int16, device=device)


def pack_into(planes: Shaped[Tensor, "words N"], start: int, codes: UInt8[Tensor, "rows in"], bits: int) -> None:
    """Write some rows of W^, from row `start` on, into their columns. Raises ValueError for a code of more bits."""
    step = rows_at_once(codes.shape[1])
    for first in range(0, len(codes), step):
        part = codes[first : first + step]
        if part.numel() and int(part.max()) >= 2**bits:
            raise ValueError(f"a code of {int(part.max())} has more than {bits} bits")
        planes[:, start + first : start + first + len(part)] = packed_words(part, bits)


def pack_planes(codes: UInt8[Tensor, "out in"], bits: int) -> Shaped[Tensor, "words N"]:
    """All codes of a layer."""
    planes = empty_planes(codes.shape[0], codes.shape[1], bits, codes.device)
    pack_into(planes, 0, codes, bits)
    return planes


def packed_words(codes: UInt8[Tensor, "rows in"], bits: int) -> Shaped[Tensor, "words rows"]:
    """Some columns of the planes."""
    pad = -codes.shape[1] % (16 * PLANES[bits])
    planes = torch.nn.functional.pad(codes, (0, pad)).T.to(torch.int32)
    planes = planes.reshape(-1, PLANES[bits], 16, planes.shape[1])  # (blocks, planes, 16, rows)
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
