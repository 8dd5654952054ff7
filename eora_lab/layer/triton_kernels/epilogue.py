"""How a program ends: add (x Aᵀ) Bᵀ to its tile, then bias, and write y once.

Split-K: each program leaves a float32 partial tile; the last one to arrive adds them in a fixed order. The counters are
zeroed by `down_kernel`, so a call needs no state that outlives it and no memset.
"""

import triton
import triton.language as tl

from eora_lab.layer.triton_kernels.planes import dot


@triton.jit
def add_path(
    accumulator,  # (BLOCK_M, BLOCK_N) float32; the pointers as in decode_kernel
    tile_ptr,  # the row of `tiles` for these columns
    xa_ptr,
    bt_ptr,
    ids_ptr,
    m,
    n,
    M,
    NP,
    R,
    paths,
    tile_rank,
    chunks,
    split,
    DTYPE: tl.constexpr,
    PATHS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The accumulator, and (x Aᵀ) Bᵀ of this split's share of the ranks.

    Where each row has its own path, one path after another for its rows; one that no row has is passed over.
    """
    first_rank = tl.load(tile_ptr)
    ranks = tl.load(tile_ptr + 1)
    if PATHS == "rows":
        for path in range(paths):
            mine = tl.load(ids_ptr + m, mask=m < M, other=-1) == path
            if tl.max(mine.to(tl.int32), axis=0) > 0:
                accumulator = add_ranks(
                    accumulator, xa_ptr, bt_ptr, mine, first_rank, ranks,
                    m, n, M, NP, R, chunks, split, DTYPE, SPLIT_K, BLOCK_M, BLOCK_R,
                )  # fmt: skip
            bt_ptr += tile_rank * NP
    else:
        accumulator = add_ranks(
            accumulator, xa_ptr, bt_ptr, m < M, first_rank, ranks,
            m, n, M, NP, R, chunks, split, DTYPE, SPLIT_K, BLOCK_M, BLOCK_R,
        )  # fmt: skip
    return accumulator


@triton.jit
def add_ranks(
    accumulator,
    xa_ptr,
    bt_ptr,
    mine,  # the rows that have this path
    first_rank,
    ranks,
    m,
    n,
    M,
    NP,
    R,
    chunks,
    split,
    DTYPE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The accumulator, and one path's share."""
    for r0 in range(split * BLOCK_R, ranks, SPLIT_K * BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        mask = mine[:, None] & (r < ranks)[None, :]
        xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for chunk in range(chunks):
            place = (chunk * M + m)[:, None] * R + (first_rank + r)[None, :]
            xa += tl.load(xa_ptr + place, mask=mask, other=0.0).to(tl.float32)
        bt = tl.load(bt_ptr + r[:, None] * NP + n[None, :], mask=(r < ranks)[:, None], other=0.0)
        accumulator = dot(xa.to(DTYPE), bt, accumulator)
    return accumulator


@triton.jit
def finish(
    accumulator,  # (BLOCK_M, BLOCK_N) float32; the pointers as in decode_kernel
    tile_ptr,
    bias_ptr,
    partial_ptr,
    counters_ptr,
    y_ptr,
    m,
    n,
    M,
    N,
    start,  # of these columns within their tile of 128
    number,  # of this tile of y
    split,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the other splits' shares and the bias, and store."""
    column = tl.load(tile_ptr + 2) + start + tl.arange(0, BLOCK_N)
    y = y_ptr + m.to(tl.int64)[:, None] * N + column[None, :]
    inside = (m < M)[:, None] & (column < tl.load(tile_ptr + 3))[None, :]
    if SPLIT_K == 1:
        if HAS_BIAS:
            accumulator += tl.load(bias_ptr + n).to(tl.float32)[None, :]
        tl.store(y, accumulator.to(DTYPE), mask=inside)
    else:
        place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        partial = partial_ptr + number.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N) + place
        tl.store(partial + split * (BLOCK_M * BLOCK_N), accumulator, mask=(m < M)[:, None])
        tl.debug_barrier()  # every thread's part is written before one of them says so
        if tl.atomic_add(counters_ptr + number, 1, sem="acq_rel") == SPLIT_K - 1:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for s in range(SPLIT_K):
                total += tl.load(
                    partial + s * (BLOCK_M * BLOCK_N), mask=(m < M)[:, None], other=0.0, cache_modifier=".cg"
                )
            if HAS_BIAS:
                total += tl.load(bias_ptr + n).to(tl.float32)[None, :]
            tl.store(y, total.to(DTYPE), mask=inside)
