"""The fused product for many rows (prefill), and the weight made dense for rows so many that cuBLAS is faster.

Here a block's codes are scaled in registers, in float32, and rounded once to the dtype of x: the cost is spread over
the rows of a tile. x Aᵀ comes from cuBLAS.
"""

import triton
import triton.language as tl

from eora_lab.layer.triton_kernels.decode import shift
from eora_lab.layer.triton_kernels.epilogue import add_path
from eora_lab.layer.triton_kernels.planes import dot, load_planes


@triton.jit
def dense_planes(
    planes,
    FIRST: tl.constexpr,
    scales_ptr,
    offsets_ptr,
    k0,
    n,
    NP,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Eight planes of W^ᵀ in DTYPE, from plane FIRST on, whose channels start at k0."""
    dense = ()
    for j in tl.static_range(8):
        g = (k0 + 16 * j) // GROUP if GROUP else 0
        if j == 0 or (GROUP and 16 * j % GROUP == 0):
            scale = tl.load(scales_ptr + g * NP + n)
            offset = shift(scale, offsets_ptr + g * NP + n, 2**BITS)
        dense += ((planes[FIRST + j].to(tl.float32) * scale[None, :] + offset[None, :]).to(DTYPE),)  # type: ignore[assignment]
    return dense


@triton.jit(do_not_specialize=["M", "blocks", "paths", "tile_rank"])
def prefill_kernel(
    x_ptr,  # (M, K), rows stride_xm apart
    q_ptr,  # packed codes, scales, offsets, tiles, B and bias: as in decode_kernel
    scales_ptr,
    offsets_ptr,
    tiles_ptr,
    xa_ptr,  # (M, R)
    bt_ptr,
    bias_ptr,
    ids_ptr,
    y_ptr,  # out: (M, N)
    M,
    N,
    K,
    NP,
    R,
    blocks,
    paths,
    tile_rank,
    stride_xm,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PATHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program a tile of y, in groups of 8 rows of tiles, so that neighbours find a weight in L2."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PLANES: tl.constexpr = 8 if BITS == 4 else 16
    tiles_n = NP // BLOCK_N
    tiles_m = tl.cdiv(M, BLOCK_M)
    first_m = tl.program_id(0) // (8 * tiles_n) * 8
    height = tl.minimum(tiles_m - first_m, 8)
    within = tl.program_id(0) % (8 * tiles_n)
    tile_n = within // height
    m = (first_m + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(blocks):
        planes = load_planes(q_ptr, block, n, NP, BITS, DTYPE)
        for half in tl.static_range(PLANES // 8):
            k0 = block * (16 * PLANES) + 128 * half
            w = dense_planes(planes, 8 * half, scales_ptr, offsets_ptr, k0, n, NP, BITS, GROUP, DTYPE)
            for j in tl.static_range(8):
                k = k0 + 16 * j + tl.arange(0, 16)
                mask = (m < M)[:, None] if EVEN_K else (m < M)[:, None] & (k < K)[None, :]
                x = tl.load(rows + k[None, :], mask=mask, other=0.0)
                accumulator = dot(x, w[j], accumulator)
    tile = tiles_ptr + (tile_n * BLOCK_N // 128) * 4
    accumulator = add_path(accumulator, tile, xa_ptr, bt_ptr, ids_ptr, m, n, M, NP, R, paths, tile_rank, 1,
                           0, DTYPE, PATHS, 1, BLOCK_M, BLOCK_R)  # fmt: skip
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    column = tl.load(tile + 2) + (tile_n * BLOCK_N) % 128 + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (column < tl.load(tile + 3))[None, :]
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + column[None, :], accumulator.to(DTYPE), mask=inside)


@triton.jit
def dense_kernel(
    q_ptr,
    scales_ptr,
    offsets_ptr,
    tiles_ptr,
    w_ptr,  # out: (N, K), rows stride_wn apart
    K,
    NP,
    stride_wn,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """W^, dense. Axis 0: blocks of K; axis 1: BLOCK_N columns."""
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    PLANES: tl.constexpr = 8 if BITS == 4 else 16
    block = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    planes = load_planes(q_ptr, block, n, NP, BITS, DTYPE)
    tile = tiles_ptr + (tl.program_id(1) * BLOCK_N // 128) * 4
    column = tl.load(tile + 2) + (tl.program_id(1) * BLOCK_N) % 128 + tl.arange(0, BLOCK_N)
    inside = column < tl.load(tile + 3)
    for half in tl.static_range(PLANES // 8):
        k0 = block * (16 * PLANES) + 128 * half
        w = dense_planes(planes, 8 * half, scales_ptr, offsets_ptr, k0, n, NP, BITS, GROUP, DTYPE)
        for j in tl.static_range(8):
            k = k0 + 16 * j + tl.arange(0, 16)
            place = column.to(tl.int64)[None, :] * stride_wn + k[:, None]
            tl.store(w_ptr + place, w[j], mask=inside[None, :] & (k < K)[:, None])
