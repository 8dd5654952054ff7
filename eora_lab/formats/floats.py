"""Weights of 4 and 8 bits that are floating-point numbers, as checkpoints lay them down."""

import torch
from jaxtyping import Float32, Shaped, UInt8
from torch import Tensor

from eora_lab.compress import CodebookWeight
from eora_lab.compress.format_grids import E2M1, E4M3
from eora_lab.compress.packing import unpack


def fp8_weight(
    values: Shaped[Tensor, "out in"], scales: Shaped[Tensor, "blocks_out blocks_in"], block: tuple[int, int]
) -> CodebookWeight:
    """E4M3 numbers that share a scale in blocks of (rows, columns), the last of which may be smaller."""
    rows = scales.repeat_interleave(block[0], 0)[: len(values)].contiguous()
    return CodebookWeight(values.view(torch.uint8), E4M3, rows, 8, min(block[1], values.shape[1]))


def fp4_weight(
    packed: UInt8[Tensor, "out half"],
    scales: Shaped[Tensor, "out groups"],
    group_size: int,
    tensor_scale: Float32[Tensor, "1"] | None = None,
) -> CodebookWeight:
    """E2M1 numbers, two a byte (out, in / 2), the first in its lower half; the rest is as in `CodebookWeight`."""
    codes = unpack(packed, 4, 2 * packed.shape[1])
    return CodebookWeight(codes, E2M1, scales, 4, group_size, tensor_scale)
