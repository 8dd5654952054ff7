"""The fused product for few rows (decoding): y = x W^ᵀ + (x Aᵀ) Bᵀ + bias, W^ read once, y written once.

Two launches. `down_kernel` makes what is small: x Aᵀ and the sums of x over each group.
`decode_kernel` streams the packed weight through a chain of tensor-core steps on BASE + code, exact in 16 bits, and
scales the float32 partial sum once a group. What it then has too much or too little,

    sum_g (offset_g - BASE scale_g) sum_{k in g} x_k        (integer zero points: offset = -zero scale)

comes from the group sums: any zero point, whole or not, costs nothing a weight. (By that Inf in x makes its row NaN; a
dense layer gives Inf or -Inf.) x Aᵀ times B joins the same accumulator. Only these last steps need the first launch, so
on sm_90 the second starts before it has ended (PDL).

Triton copies codes and x to shared memory some blocks ahead, and scales only where the loop says how many (`STAGES`)
and a thread copies 4 bytes: so scales are float32. Else every group waits for memory.

Counts that change from call to call are not specialised: one machine code a layer, the one whose spills are checked.
"""

import triton
import triton.language as tl

from eora_lab.layer.triton_kernels.down import row_of_x, rows_of_tile
from eora_lab.layer.triton_kernels.epilogue import add_path, finish
from eora_lab.layer.triton_kernels.planes import dot, load_planes


@triton.jit(do_not_specialize=["M", "blocks", "chunks", "row_tiles", "paths", "tile_rank", "top"])
def decode_kernel(
    x_ptr,  # (tokens, K), rows stride_xm apart
    q_ptr,  # packed codes: (experts, blocks * lanes * 16, NP) int16
    scales_ptr,  # (experts, KP / GROUP, NP) float32, or (experts, 1, NP) for one group a row
    offsets_ptr,  # of the shape of scales: the weight of code 0; or uint8: the zero point
    tiles_ptr,  # (NP / 128, 4) int32: first rank, ranks, first and last + 1 output column of each 128 packed columns
    xa_ptr,  # (chunks, M, R) float32
    sums_ptr,  # (M, KP / SUM) float32
    bt_ptr,  # (paths, most ranks of a tile, NP)
    bias_ptr,  # (experts, NP), or nothing
    partial_ptr,  # (tiles, SPLIT_K, BLOCK_M, BLOCK_N) float32
    counters_ptr,  # (tiles,) int32, zero
    ids_ptr,  # as in down_kernel, which says what PATHS means
    slots_ptr,
    y_ptr,  # out: (M, N)
    M,
    N,
    K,
    NP,
    R,
    blocks,
    chunks,
    row_tiles,
    paths,
    tile_rank,
    top,
    stride_xm,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # channels that share a scale: 16, 32, 64, 128; 0: one scale a row
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether blocks fill K
    PATHS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,  # blocks of K on their way
    PDL: tl.constexpr,
):
    """Axis 0: BLOCK_M rows (first) by BLOCK_N columns, so that neighbours read the same weights; axis 1: every
    SPLIT_K-th block of K."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PLANES: tl.constexpr = 8 if BITS == 4 else 16
    SUM: tl.constexpr = GROUP if GROUP else 128  # channels of one partial sum
    tile_n = tl.program_id(0) // row_tiles
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m, expert = rows_of_tile(ids_ptr, slots_ptr, tl.program_id(0) % row_tiles, PATHS, BLOCK_M)
    if PATHS == "experts":
        if expert < 0:
            return
        grids = (blocks * (16 * PLANES // SUM) if GROUP else 1) * expert * NP
        q_ptr += blocks * (32 if BITS == 4 else 48) * expert * NP
        scales_ptr += grids
        offsets_ptr += grids
        bt_ptr += tile_rank * expert * NP
        bias_ptr += expert * NP
    x_ptr += row_of_x(m, top, PATHS)[:, None] * stride_xm
    split = tl.program_id(1)
    tile_ptr = tiles_ptr + (tile_n * BLOCK_N // 128) * 4
    accumulator = stream(x_ptr, q_ptr, scales_ptr, m, n, M, K, NP, blocks, split,
                         DTYPE, BITS, GROUP, SUM, PLANES, EVEN_K, SPLIT_K, BLOCK_M, BLOCK_N, STAGES)  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    accumulator = correct(accumulator, sums_ptr, scales_ptr, offsets_ptr, m, n, M, NP, blocks, split,
                          BITS, GROUP, SUM, PLANES, SPLIT_K)  # fmt: skip
    accumulator = add_path(accumulator, tile_ptr, xa_ptr, bt_ptr, ids_ptr, m, n, M, NP, R, paths, tile_rank, chunks,
                           split, DTYPE, PATHS, SPLIT_K, BLOCK_M, BLOCK_R)  # fmt: skip
    finish(accumulator, tile_ptr, bias_ptr, partial_ptr, counters_ptr, y_ptr, m, n, M, N, tile_n * BLOCK_N % 128,
           tl.program_id(0), split, DTYPE, HAS_BIAS, SPLIT_K, BLOCK_M, BLOCK_N)  # fmt: skip


@triton.jit
def stream(
    x_ptr, q_ptr, scales_ptr, m, n, M, K, NP, blocks, split, DTYPE: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, SUM: tl.constexpr, PLANES: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sum_g scale_g sum_{k in g} x_k (BASE + code_k) over this split's blocks; without groups, not scaled yet."""
    SUMS: tl.constexpr = 16 * PLANES // SUM  # a block
    k16 = tl.arange(0, 16)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(split, blocks, SPLIT_K, num_stages=STAGES):
        planes = load_planes(q_ptr, block, n, NP, BITS, DTYPE)
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for j in tl.static_range(PLANES):
            k = block * (16 * PLANES) + 16 * j + k16
            mask = (m < M)[:, None] if EVEN_K else (m < M)[:, None] & (k < K)[None, :]
            part = dot(tl.load(x_ptr + k[None, :], mask=mask, other=0.0), planes[j], part)
            if 16 * (j + 1) % SUM == 0:
                if GROUP:
                    scale = tl.load(scales_ptr + (block * SUMS + 16 * j // SUM) * NP + n)
                    accumulator += part * scale[None, :]
                else:
                    accumulator += part
                part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return accumulator


@triton.jit
def correct(
    accumulator, sums_ptr, scales_ptr, offsets_ptr, m, n, M, NP, blocks, split, BITS: tl.constexpr,
    GROUP: tl.constexpr, SUM: tl.constexpr, PLANES: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Scale the accumulator if that was left to the end, and add the group sums times (offset - BASE scale)."""
    SUMS: tl.constexpr = 16 * PLANES // SUM  # a block
    BASE: tl.constexpr = 2**BITS
    sums = sums_ptr + m * (blocks * SUMS)
    if GROUP:
        for block in range(split, blocks, SPLIT_K):
            for i in tl.static_range(SUMS):
                g = block * SUMS + i
                total = tl.load(sums + g, mask=m < M, other=0.0)
                scale = tl.load(scales_ptr + g * NP + n)
                accumulator += total[:, None] * shift(scale, offsets_ptr + g * NP + n, BASE)[None, :]
    else:
        total = tl.zeros_like(m).to(tl.float32)
        for block in range(split, blocks, SPLIT_K):
            for i in tl.static_range(SUMS):
                total += tl.load(sums + block * SUMS + i, mask=m < M, other=0.0)
        scale = tl.load(scales_ptr + n)
        accumulator = accumulator * scale[None, :] + total[:, None] * shift(scale, offsets_ptr + n, BASE)[None, :]
    return accumulator


@triton.jit
def shift(scale, offset_ptr, BASE: tl.constexpr):
    """What a group's sum of x is multiplied by: offset - BASE scale, or -(zero + BASE) scale."""
    offset = tl.load(offset_ptr)
    if offset.dtype == tl.uint8:
        return -(offset.to(tl.float32) + BASE) * scale
    else:
        return offset.to(tl.float32) - BASE * scale
