"""A weight as the kernel reads it: its codes as they are stored, float32 grids, and the order that x must have."""

from dataclasses import dataclass
from math import gcd

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64, UInt8
from torch import Tensor

from eora_lab.compress import Compressed, GridWeight
from eora_lab.compress.packing import pack

LANES = 16  # of a vector
FIELDS = {2: 4, 3: 8, 4: 2, 8: 1}  # bits -> codes in a lane: as many as fill whole bytes
NUMBERS = {torch.bfloat16: 16, torch.float32: 32}  # what is read as it is, and its bits
BLOCK = 4  # rows of x that share the unpacking
EXTRA = 8  # bytes that the kernel may read behind those it needs


@dataclass(frozen=True)
class PackedGrid:
    """A row is `blocks` blocks of `steps` steps of 16 lanes; `groups` groups share a block, more than one of a step.

    codes:   the stored bit streams, one a row; the weight's own tensor where its groups are in place. Of 16 and 32
             bits, they are the weights themselves.
    last:    the rows of it that a whole number of steps would read beyond, padded.
    scales:  float32, and offsets: the weight of code 0; padded to whole blocks.
    place:   the channel of x for every code of the steps, step by step and field by field of their lanes; -1: none.
    """

    codes: UInt8[Tensor, "out bytes"]
    last: UInt8[Tensor, "few row_bytes"]
    scales: Float[Tensor, "out block_groups"]
    offsets: Float[Tensor, "out block_groups"]
    place: Int32[Tensor, " padded_in"]
    bits: int
    blocks: int
    steps: int
    groups: int


def why_not_packed(weight: Compressed) -> str | None:
    """What the kernel cannot read of a weight, of which one row is enough; or None."""
    if not isinstance(weight, GridWeight):
        return f"it reads grids, not a weight that is stored as {weight.kind}"
    if weight.bits not in FIELDS:
        return f"it reads {', '.join(map(str, FIELDS))} bits, not {weight.bits}"
    if weight.mask is not None and weight.offsets.dtype != torch.uint8:
        return "it reads a mask with integer zero points only"
    return None


def why_not_dense(weight: Float[Tensor, "out in"]) -> str | None:
    """What the kernel cannot read of a weight that is not compressed; or None."""
    if not weight.is_cpu or weight.dtype not in NUMBERS:
        return f"it reads {' and '.join(map(str, NUMBERS))} on a CPU"
    return None if weight.is_contiguous() and weight.shape[1] % LANES == 0 else f"it reads rows of whole {LANES}s"


def pack_grid(weight: GridWeight, stored: UInt8[Tensor, "out bytes"]) -> PackedGrid:
    """A weight that `why_not_packed` lets through; stored: its codes as a file holds them."""
    step = LANES * FIELDS[weight.bits]
    order, group = in_order(weight)
    if order is None:
        order, codes = torch.arange(weight.shape[1]), stored
    else:
        codes = pack(filled(weight)[:, order.clamp(min=0)] * (order >= 0), weight.bits)
    together = gcd(group, step)  # channels of a step with the same grid
    groups, steps = (1, group // step) if together == step else (step // together, 1)
    blocks = -(-len(order) // (step * steps))

    def grids(values: Tensor) -> Tensor:
        values = values.float()
        if together < step:
            values = values.repeat_interleave(group // together, 1)
        missing = blocks * groups - values.shape[1]
        return (F.pad(values, (0, missing)) if missing else values).contiguous()

    scales, offsets = weight.scales.float(), weight.offsets.float()
    if weight.offsets.dtype == torch.uint8:
        offsets = -offsets * scales
    place = F.pad(order, (0, blocks * steps * step - len(order)), value=-1)
    place = place.view(-1, LANES, FIELDS[weight.bits]).transpose(1, 2).flatten().int()
    last = beyond(codes, blocks * steps * step * weight.bits // 8 + EXTRA)
    return PackedGrid(codes, last, grids(scales), grids(offsets), place, weight.bits, blocks, steps, groups)


def pack_dense(weight: Float[Tensor, "out in"]) -> PackedGrid:
    """A weight that `why_not_dense` lets through, where it lies; all rows share a grid that changes nothing."""
    steps = gcd(weight.shape[1] // LANES, 4)
    blocks = weight.shape[1] // LANES // steps
    scales, offsets = (make(1, blocks).expand(len(weight), -1) for make in (torch.ones, torch.zeros))
    codes, place = weight.detach().view(torch.uint8), torch.arange(weight.shape[1], dtype=torch.int32)
    return PackedGrid(codes, codes[:0], scales, offsets, place, NUMBERS[weight.dtype], blocks, steps, 1)


def in_order(weight: GridWeight) -> tuple[Int64[Tensor, " padded_in"] | None, int]:
    """The channels so that groups are runs of equal size, which fill lanes, with -1 where there is none; and that size.

    None: they are as they are stored.
    """
    features, groups, fields = weight.shape[1], weight.scales.shape[1], FIELDS[weight.bits]
    group, index = weight.group_size, weight.g_idx
    if groups == 1:
        group, index = -(-features // (LANES * fields)) * LANES * fields, None
    if index is None and group % fields == 0:
        return (None if weight.mask is None else torch.arange(features)), group
    index = torch.arange(features) // group if index is None else index.long()
    counts = torch.bincount(index, minlength=groups)
    group = -(-int(counts.max()) // fields) * fields
    channels = index.argsort(stable=True)
    nth = torch.arange(features) - (counts.cumsum(0) - counts)[index[channels]]
    order = torch.full((groups * group,), -1)
    order[index[channels] * group + nth] = channels
    return order, group


def filled(weight: GridWeight) -> UInt8[Tensor, "out in"]:
    """The codes, with the zero point where a mask drops a weight."""
    if weight.mask is None:
        return weight.codes
    index = torch.arange(weight.shape[1]) // weight.group_size if weight.g_idx is None else weight.g_idx.long()
    return torch.where(weight.mask, weight.codes, weight.offsets[:, index])


def beyond(codes: UInt8[Tensor, "out bytes"], row_bytes: int) -> UInt8[Tensor, "few row_bytes"]:
    """The last rows, from the first one of which so many bytes would not fit into the tensor."""
    out, stored = codes.shape
    few = min(-(-max(row_bytes - stored, 0) // stored), out)
    tail = F.pad(codes[out - few :].flatten(), (0, row_bytes))
    return tail.as_strided((few, row_bytes), (stored, 1)).contiguous()
