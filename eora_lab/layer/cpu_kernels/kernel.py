"""The loops of the product, compiled by numba for the processor at hand and kept on disk.

A step is sixteen lanes of codes as they are stored, or sixteen weights of 16 or 32 bits; x lies in the same order,
field by field of a step. Each group of a row has a scale s and the weight o of code 0: its part of the product is
s (codes . x) + o (sum of x). With these sums made once for all rows, offsets of any kind cost one addition a group.
"""

from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
from numba import carray, cfunc, from_dtype, literally, njit, types

from eora_lab.layer.cpu_kernels.packed import BLOCK, FIELDS, LANES
from eora_lab.layer.cpu_kernels.team import Call
from eora_lab.layer.cpu_kernels.vectors import (
    add,
    add_codes,
    add_products,
    fetch,
    load,
    load_half,
    pointer,
    scale,
    spread,
    store_codes,
    sums,
    zeros,
)  # fmt: skip

CALL = types.CPointer(from_dtype(np.dtype(Call)))
AHEAD = 4096  # bytes of codes that are asked for before they are needed: what is next has not been read lately
TOGETHER = 16  # outputs for which such rows stay in the cache
barrier = types.ExternalFunction("eora_lab_barrier", types.void())
thread_number = types.ExternalFunction("eora_lab_thread_number", types.int32())
thread_count = types.ExternalFunction("eora_lab_thread_count", types.int32())  # fewer than asked for, it may be


@njit
def share(count, me, threads):
    """The part of a thread."""
    return range(count * me // threads, count * (me + 1) // threads)


@njit
def rounded(value):
    """The nearest bfloat16, ties to even, as its bits."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


@njit
def length_of(call, step):
    """Of a row of x in the order of the codes."""
    return call.blocks * call.steps * step


@njit
def totals_of(call, step):
    """Where the sums of x lie."""
    return call.scratch + 4 * call.padded * length_of(call, step)


@njit
def down_of(call, step):
    """Where A x lies, behind those of other layers that share x."""
    return totals_of(call, step) + 4 * call.padded * (call.blocks * LANES + call.ranks_before)


@njit
def codes_of(call, out):
    """Where the codes of an output lie."""
    if out < call.safe:
        return call.codes + out * call.code_stride
    return call.last + (out - call.safe) * call.last_stride


@njit
def gather(call, step, blocks):
    """x in the order of the codes, and for every group its sums, lane by lane. Rows that only fill a block are 0."""
    place, x, x16 = pointer(call.place, types.int32), pointer(call.x, types.float32), pointer(call.x, types.uint16)
    ordered, totals = pointer(call.scratch, types.float32), pointer(totals_of(call, step), types.float32)
    rows, half, features, block_length = call.rows, call.half, call.features, call.steps * step
    for row in range(call.padded):
        for block in blocks:
            sum_at = (row * call.blocks + block) * LANES
            for lane in range(LANES):
                totals[sum_at + lane] = 0
            for i in range(block * block_length, (block + 1) * block_length):
                value, channel = np.float32(0), place[i]
                if row < rows and channel >= 0:
                    at = row * features + channel
                    value = np.uint32(x16[at] << 16).view(np.float32) if half else x[at]
                ordered[row * call.blocks * block_length + i] = value
                totals[sum_at + i % LANES] += value


@njit(forceinline=True)
def add_path(total, half, matrix, at, other, stride, count):
    """total[r] + a row of A or B, from its element `at`, times `count` numbers of the r-th other row."""
    for i in range(0, count, LANES):
        values = load_half(matrix + 2 * (at + i)) if half else load(matrix + 4 * (at + i))
        total = add_products(total, values, other + 4 * i, 4 * stride)
    return total


@njit
def down(call, step, ranks, zero):
    """A x."""
    out, factor = pointer(down_of(call, step), types.float32), pointer(call.factor, types.float32)
    length = length_of(call, step)
    for rank in ranks:
        for row in range(0, call.padded, len(zero)):
            x = call.scratch + 4 * row * length
            found = sums(add_path(zero, call.half_path, call.A, rank * length, x, length, length))
            for r in range(len(zero)):
                out[(row + r) * call.rank + rank] = factor[rank] * found[r]


@njit
def up(call, step, outputs, zero, bits, groups, steps):
    """W^ x + B (A x) + bias."""
    literally(bits)
    literally(groups)
    literally(steps)
    y, y16, bias = pointer(call.y, types.float32), pointer(call.y, types.uint16), pointer(call.bias, types.float32)
    code_bytes, length, blocks, rank = step * bits // 8, length_of(call, step), call.blocks, call.rank
    ordered, totals, down = call.scratch, totals_of(call, step), down_of(call, step)
    rows, padded, width, half, has_bias = call.rows, call.padded, call.outputs, call.half, call.bias != 0
    for first in range(outputs.start, outputs.stop, TOGETHER):
        for row in range(0, padded, len(zero)):
            for out in range(first, min(first + TOGETHER, outputs.stop)):
                scaled, shifted, codes, x = zero, zero, codes_of(call, out), ordered + 4 * row * length
                here, grid = totals + 4 * LANES * row * blocks, 4 * out * call.grid_stride
                scales, offsets = call.scales + grid, call.offsets + grid
                for _ in range(blocks):
                    part = zero
                    for _ in range(call.steps if steps == 0 else steps):
                        part = add_codes(part, codes, x, 4 * length, bits)
                        fetch(codes + AHEAD)
                        codes += code_bytes
                        x += 4 * step
                    scaled = scale(scaled, part, spread(scales, groups))
                    shifted = add_products(shifted, spread(offsets, groups), here, 4 * LANES * blocks)
                    scales += 4 * groups
                    offsets += 4 * groups
                    here += 4 * LANES
                fetch(scales + AHEAD // 8)
                fetch(offsets + AHEAD // 8)
                shifted = add_path(shifted, call.half_path, call.B, out * rank, down + 4 * row * rank, rank, rank)
                found = sums(add(scaled, shifted))
                for r in range(min(len(zero), rows - row)):
                    value = found[r] + bias[out] if has_bias else found[r]
                    if half:
                        y16[(row + r) * width + out] = rounded(value)
                    else:
                        y[(row + r) * width + out] = value


@njit
def unpack(call, step, outputs, bits, groups):
    """Rows of W^, their channels in the order of the codes."""
    literally(bits)
    literally(groups)
    for out in outputs:
        codes, y = codes_of(call, call.first + out), call.y + 4 * out * length_of(call, step)
        for block in range(call.blocks):
            grid = 4 * ((call.first + out) * call.grid_stride + block * groups)
            factor, summand = spread(call.scales + grid, groups), spread(call.offsets + grid, groups)
            for _ in range(call.steps):
                store_codes(y, codes, factor, summand, bits)
                codes += step * bits // 8
                y += 4 * step


@lru_cache
def product_kernel(bits: int, groups: int, steps: int):
    """y = W^ x + B (A x) + bias for codes of some bits, where a step spans so many groups, or a part of one; of one
    layer, or several that share x and all of this.

    steps: of a block, which are then unrolled; 0: any number.
    """
    step, sources = LANES * FIELDS.get(bits, 1), sources_sum()

    def product(calls):
        """What every thread of a team does, for all layers that share x."""
        _ = sources  # part of what numba finds the function by
        first = carray(calls, 1)[0]
        layers = carray(calls, first.count)
        me, threads = (thread_number(), thread_count()) if first.threads > 1 else (0, 1)
        gather(first, step, share(first.blocks, me, threads))
        if threads > 1:
            barrier()
        if layers[-1].ranks_before + layers[-1].rank:
            for layer in layers:
                if first.padded == 1:
                    down(layer, step, share(layer.rank, me, threads), zeros(1))
                else:
                    down(layer, step, share(layer.rank, me, threads), zeros(BLOCK))
            if threads > 1:
                barrier()
        for layer in layers:
            if first.padded == 1:
                up(layer, step, share(layer.outputs, me, threads), zeros(1), bits, groups, steps)
            else:
                up(layer, step, share(layer.outputs, me, threads), zeros(BLOCK), bits, groups, steps)

    return compiled(product)


@lru_cache
def unpack_kernel(bits: int, groups: int):
    """y = `rows` rows of W^ from `first` on, as `product_kernel` is made."""
    step, sources = LANES * FIELDS[bits], sources_sum()

    def rows_of(calls):
        """What every thread of a team does."""
        _ = sources
        call = carray(calls, 1)[0]
        me, threads = (thread_number(), thread_count()) if call.threads > 1 else (0, 1)
        unpack(call, step, share(call.rows, me, threads), bits, groups)

    return compiled(rows_of)


def compiled(function) -> int:
    """The address of its machine code: made in some two seconds, once for a processor, and kept in numba's cache."""
    try:
        return cfunc(types.void(CALL), cache=True)(function).address
    except RuntimeError:  # there is no folder that numba may write to
        return cfunc(types.void(CALL))(function).address


def sources_sum() -> int:
    """A number that changes with the files of this folder."""
    return crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
