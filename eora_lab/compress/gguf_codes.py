"""Where the codes lie in the blocks of GGUF types, to read and to change them: of those with a code a weight.

A block holds scales and codes; how they become numbers is gguf's to say (`gguf.quants.dequantize`). In all but MXFP4 a
weight is origin + step * code, with one origin and one step for a group of neighbours (ggml-common.h, ggml-quants.c).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Field:
    """Some bits of every code, next to each other.

    byte, shift: of their first bit in the block, for every weight of the block.
    """

    bits: int
    byte: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Of the codes of one type. fields: the lowest bits of the codes first."""

    fields: tuple[Field, ...]
    block_bytes: int
    group_size: int  # weights that share a scale
    signed: bool = False  # codes are stored as two's complement
    even: bool = True  # levels are evenly spaced

    @property
    def block_size(self) -> int:
        """Weights in a block."""
        return len(self.fields[0].byte)

    @property
    def bits(self) -> int:
        """Of a code."""
        return sum(field.bits for field in self.fields)

    @cached_property
    def places(self) -> np.ndarray:
        """(weights, bits): place in the block's stream of bits, the lowest first."""
        return np.stack(
            [8 * field.byte + field.shift + bit for field in self.fields for bit in range(field.bits)], axis=1
        )

    def codes(self, raw: np.ndarray) -> np.ndarray:
        """The codes (out, in) in rows of bytes (out, bytes), both uint8."""
        blocks = raw.reshape(-1, self.block_bytes)
        stream = np.unpackbits(blocks, axis=1, bitorder="little")[:, self.places]  # (blocks, weights, bits)
        codes = np.packbits(stream, axis=2, bitorder="little")[..., 0]
        return (codes ^ self._flip).reshape(len(raw), -1)

    def with_codes(self, raw: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """The same rows of bytes with other codes."""
        blocks = np.unpackbits(raw.reshape(-1, self.block_bytes), axis=1, bitorder="little")
        bits = np.unpackbits((codes ^ self._flip).reshape(-1, self.block_size, 1), axis=2, bitorder="little")
        blocks[:, self.places] = bits[..., : self.bits]
        return np.packbits(blocks, axis=1, bitorder="little").reshape(raw.shape)

    @property
    def _flip(self) -> np.uint8:
        return np.uint8(1 << (self.bits - 1)) if self.signed else np.uint8(0)


def _halves(start: int) -> Field:
    """32 weights, the first 16 in the low half of 16 bytes."""
    i = np.arange(32)
    return Field(4, start + i % 16, 4 * (i // 16))


_i = np.arange(256)  # weight of a super-block
_half, _quarter, _chunk, _lane = _i // 128, _i // 32 % 4, _i // 64, _i % 32
_j = np.arange(32)

LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout((_halves(2),), 18, 32),
    "Q4_1": Layout((_halves(4),), 20, 32),
    "Q5_0": Layout((_halves(6), Field(1, 2 + _j // 8, _j % 8)), 22, 32),
    "Q5_1": Layout((_halves(8), Field(1, 4 + _j // 8, _j % 8)), 24, 32),
    "Q8_0": Layout((Field(8, 2 + _j, 0 * _j),), 34, 32, signed=True),
    "MXFP4": Layout((_halves(1),), 17, 32, even=False),
    "Q2_K": Layout((Field(2, 16 + 32 * _half + _lane, 2 * _quarter),), 84, 16),
    "Q3_K": Layout((Field(2, 32 + 32 * _half + _lane, 2 * _quarter), Field(1, _lane, _i // 32)), 110, 16),
    "Q4_K": Layout((Field(4, 16 + 32 * _chunk + _lane, 4 * (_i // 32 % 2)),), 144, 32),
    "Q5_K": Layout((Field(4, 48 + 32 * _chunk + _lane, 4 * (_i // 32 % 2)), Field(1, 16 + _lane, _i // 32)), 176, 32),
    "Q6_K": Layout(
        (
            Field(4, 64 * _half + 32 * (_quarter % 2) + _lane, 4 * (_quarter // 2)),
            Field(2, 128 + 32 * _half + _lane, 2 * _quarter),
        ),
        210,
        16,
    ),
}
