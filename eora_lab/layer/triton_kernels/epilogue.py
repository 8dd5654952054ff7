"""How a decoding program ends: add (x Aᵀ) Bᵀ to its tile, then bias, and write y once.

Split-K: each program leaves a float32 partial tile; the last one to arrive adds them in a fixed order. The counters are
zeroed by `down_kernel`, so a call needs no state that outlives it and no memset.
"""

import triton
import triton.language as tl

from eora_lab.layer.triton_kernels.planes import dot


@triton.jit
def finish(
    accumulator,  # (BLOCK_M, BLOCK_N) float32; the pointers as in decode_kernel
    tiles_ptr,
    xa_ptr,
    bt_ptr,
    bias_ptr,
    partial_ptr,
    counters_ptr,
    y_ptr,
    m,
    n,
    M,
    N,
    NP,
    R,
    chunks,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Axes of the launch: tiles of columns, splits of K (which share the ranks), tiles of rows."""
    split = tl.program_id(1)
    tile = tiles_ptr + (tl.program_id(0) * BLOCK_N // 128) * 4
    first_rank = tl.load(tile)
    ranks = tl.load(tile + 1)
    for r0 in range(split * BLOCK_R, ranks, SPLIT_K * BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        mask = (m < M)[:, None] & (r < ranks)[None, :]
        xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for chunk in range(chunks):
            xa += tl.load(xa_ptr + (chunk * M + m)[:, None] * R + (first_rank + r)[None, :], mask=mask, other=0.0)
        bt = tl.load(bt_ptr + r[:, None] * NP + n[None, :], mask=(r < ranks)[:, None], other=0.0)
        accumulator = dot(xa.to(DTYPE), bt, accumulator)
    column = tl.load(tile + 2) + (tl.program_id(0) * BLOCK_N) % 128 + tl.arange(0, BLOCK_N)
    y = y_ptr + m.to(tl.int64)[:, None] * N + column[None, :]
    inside = (m < M)[:, None] & (column < tl.load(tile + 3))[None, :]
    if SPLIT_K == 1:
        if HAS_BIAS:
            accumulator += tl.load(bias_ptr + n).to(tl.float32)[None, :]
        tl.store(y, accumulator.to(DTYPE), mask=inside)
    else:
        number = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
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
