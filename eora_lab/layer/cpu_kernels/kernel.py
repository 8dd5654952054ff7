"""The loops of the product, compiled by numba for the processor at hand and kept on disk.

A step is sixteen lanes of codes as they are stored; x lies in the same order, field by field of a step. Each group of
a row has a scale s and the weight o of code 0: its part of the product is s (codes . x) + o (sum of x). With these sums
made once for all rows, offsets of any kind cost one addition a group.
"""

from functools import lru_cache

import numpy as np
from numba import carray, cfunc, from_dtype, literally, njit
from numba.core import types

from eora_lab.layer.cpu_kernels.team import Call
from eora_lab.layer.cpu_kernels.vectors import (
    FIELDS,
    LANES,
    add,
    add_codes,
    add_products,
    load,
    pointer,
    scale,
    spread,
    sums,
    zeros,
)  # fmt: skip

CALL = types.CPointer(from_dtype(np.dtype(Call)))
BLOCK = 4  # rows of x that share the unpacking
barrier = types.ExternalFunction("eora_lab_barrier", types.void())
thread_number = types.ExternalFunction("eora_lab_thread_number", types.int32())


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
def gather(call, step, blocks):
    """x in the order of the codes, and for every group its sums, lane by lane. Rows that only fill a block are 0."""
    place, x, x16 = pointer(call.place, types.int32), pointer(call.x, types.float32), pointer(call.x, types.uint16)
    ordered, totals = pointer(call.ordered, types.float32), pointer(call.totals, types.float32)
    length = call.blocks * call.steps * step
    for row in range(call.padded):
        for block in blocks:
            sum_at = (row * call.blocks + block) * LANES
            for lane in range(LANES):
                totals[sum_at + lane] = 0
            for i in range(block * call.steps * step, (block + 1) * call.steps * step):
                value = np.float32(0)
                if row < call.rows and place[i] >= 0:
                    at = row * call.x_stride + place[i]
                    value = np.uint32(x16[at] << 16).view(np.float32) if call.half else x[at]
                ordered[row * length + i] = value
                totals[sum_at + i % LANES] += value


@njit
def down(call, step, ranks, zero):
    """A x."""
    out = pointer(call.down, types.float32)
    length = call.blocks * call.steps * step
    for rank in ranks:
        for row in range(0, call.padded, len(zero)):
            total = zero
            for i in range(0, length, LANES):
                a = load(call.A + 4 * (rank * length + i))
                total = add_products(total, a, call.ordered + 4 * (row * length + i), 4 * length)
            found = sums(total)
            for r in range(len(zero)):
                out[(row + r) * call.rank + rank] = found[r]


@njit
def up(call, step, outputs, zero, bits, groups):
    """W^ x + B (A x) + bias."""
    literally(bits)
    literally(groups)
    y, y16, bias = pointer(call.y, types.float32), pointer(call.y, types.uint16), pointer(call.bias, types.float32)
    code_bytes, length = step * bits // 8, call.blocks * call.steps * step
    for out in outputs:
        start = call.codes + out * call.code_stride
        if out >= call.safe:
            start = call.last + (out - call.safe) * call.last_stride
        for row in range(0, call.padded, len(zero)):
            scaled, shifted, codes, x = zero, zero, start, call.ordered + 4 * row * length
            for block in range(call.blocks):
                part = zero
                for _ in range(call.steps):
                    part = add_codes(part, codes, x, 4 * length, bits)
                    codes += code_bytes
                    x += 4 * step
                grid = 4 * (out * call.grid_stride + block * groups)
                scaled = scale(scaled, part, spread(call.scales + grid, groups))
                here = call.totals + 4 * LANES * (row * call.blocks + block)
                shifted = add_products(shifted, spread(call.offsets + grid, groups), here, 4 * LANES * call.blocks)
            for i in range(0, call.rank, LANES):
                b = load(call.B + 4 * (out * call.rank + i))
                shifted = add_products(shifted, b, call.down + 4 * (row * call.rank + i), 4 * call.rank)
            found = sums(add(scaled, shifted))
            for r in range(min(len(zero), call.rows - row)):
                value = found[r]
                if call.bias:
                    value += bias[out]
                if call.half:
                    y16[(row + r) * call.outputs + out] = rounded(value)
                else:
                    y[(row + r) * call.outputs + out] = value


@lru_cache
def kernel(bits: int, groups: int):
    """The product for codes of some bits, where a step spans so many groups, or a part of one."""
    step = LANES * FIELDS[bits]

    @cfunc(types.void(CALL), cache=True)
    def whole(calls):
        """What every thread of a team does."""
        call = carray(calls, 1)[0]
        me = thread_number() if call.threads > 1 else 0
        gather(call, step, share(call.blocks, me, call.threads))
        if call.threads > 1:
            barrier()
        if call.rank:
            if call.padded == 1:
                down(call, step, share(call.rank, me, call.threads), zeros(1))
            else:
                down(call, step, share(call.rank, me, call.threads), zeros(BLOCK))
            if call.threads > 1:
                barrier()
        if call.padded == 1:
            up(call, step, share(call.outputs, me, call.threads), zeros(1), bits, groups)
        else:
            up(call, step, share(call.outputs, me, call.threads), zeros(BLOCK), bits, groups)

    return whole
