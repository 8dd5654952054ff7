"""The first of the two launches of decoding: x Aᵀ in float32, sums of x over groups, zeroed counters.

What a row of the launch is, PATHS says: "one": row m of x, for which there is one path. "rows": the same, each row with
its own path, or with none (-1). "experts": a pair of a token and an expert that it chose; the rows of a tile are pairs
of one expert, and its path is the expert's.
"""

import triton
import triton.language as tl

from eora_lab.layer.triton_kernels.planes import dot


@triton.jit
def rows_of_tile(ids_ptr, slots_ptr, tile, PATHS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of a tile (M or more: none), and its expert (0 where there are none, -1 for a tile that is empty)."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if PATHS == "experts":
        m = tl.load(slots_ptr + m)
        return m, tl.load(ids_ptr + tile).to(tl.int64)
    else:
        return m, tl.full((), 0, tl.int64)


@triton.jit
def row_of_x(m, top, PATHS: tl.constexpr):
    """The row of x that row m reads."""
    if PATHS == "experts":
        return (m // top).to(tl.int64)
    else:
        return m


@triton.jit(do_not_specialize=["M", "counters", "top"])
def down_kernel(
    x_ptr,  # (tokens, K), rows stride_xm apart
    a_ptr,  # (paths, R, K)
    xa_ptr,  # out: (chunks, M, R) float32, x Aᵀ over each chunk of K
    sums_ptr,  # out: (M, KP / GROUP) float32, x summed over each group
    counters_ptr,  # out: zeros
    ids_ptr,  # int32; "rows": the path of each row; "experts": the expert of each tile
    slots_ptr,  # int32; "experts": the rows of each tile, BLOCK_M each
    counters,
    M,
    K,
    KP,
    R,
    stride_xm,
    chunk,  # channels a program covers, a multiple of 256
    top,  # "experts": rows of a token
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PATHS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Axis 0: program 0 sums groups, the others take BLOCK_R ranks of a path; axis 1: chunks of K; axis 2: rows."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(0) - 1
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, KP)
    m, expert = rows_of_tile(ids_ptr, slots_ptr, tl.program_id(2), PATHS, BLOCK_M)
    k = tl.arange(0, 128)
    rows = x_ptr + row_of_x(m, top, PATHS).to(tl.int64)[:, None] * stride_xm
    if part < 0:
        GROUPS: tl.constexpr = 128 // GROUP
        g = tl.arange(0, GROUPS)
        for k0 in range(first, last, 128):
            x = tl.load(rows + (k0 + k)[None, :], mask=(m < M)[:, None] & (k0 + k < K)[None, :], other=0.0)
            sums = tl.sum(tl.reshape(x.to(tl.float32), (BLOCK_M, GROUPS, GROUP)), axis=2)
            place = m[:, None] * (KP // GROUP) + (k0 // GROUP + g)[None, :]
            tl.store(sums_ptr + place, sums, mask=(m < M)[:, None])
        if tl.program_id(1) == 0 and tl.program_id(2) == 0:
            for c in range(0, counters, 128):
                tl.store(counters_ptr + c + k, tl.zeros((128,), tl.int32), mask=c + k < counters)
    else:
        steps = tl.cdiv(R, BLOCK_R)
        r = part % steps * BLOCK_R + tl.arange(0, BLOCK_R)
        mine = m < M
        if PATHS == "rows":
            path = (part // steps).to(tl.int64)
            mine = mine & (tl.load(ids_ptr + m, mask=mine, other=-1) == path)
        else:
            path = expert
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            a_ptr += path * R * K
            xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k0 in range(first, last, 128):
                x = tl.load(rows + (k0 + k)[None, :], mask=mine[:, None] & (k0 + k < K)[None, :], other=0.0)
                inside = (r < R)[None, :] & (k0 + k < K)[:, None]
                a = tl.load(a_ptr + r[None, :] * K + (k0 + k)[:, None], mask=inside, other=0.0)
                xa = dot(x, a, xa)
            place = (tl.program_id(1) * M + m)[:, None] * R + r[None, :]
            tl.store(xa_ptr + place, xa, mask=mine[:, None] & (r < R)[None, :])
