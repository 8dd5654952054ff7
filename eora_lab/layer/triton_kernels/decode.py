"""The fused product for few rows (decoding): y = x W^ᵀ + (x Aᵀ) Bᵀ + bias, W^ read once, y written once.

Two launches. `down_kernel` makes what is small: x Aᵀ, in float32 and in chunks of K, and the sums of x over each group.
`decode_kernel` streams the packed weight through a chain of tensor-core steps on BASE + code, exact in 16 bits, and
scales the float32 partial sum once a group. What it then has too much or too little,

    sum_g (offset_g - BASE scale_g) sum_{k in g} x_k        (integer zero points: offset = -zero scale)

comes from the group sums: any zero point, whole or not, costs nothing a weight. x Aᵀ times B joins the same
accumulator. Only these last steps need the first launch, so on sm_90 the second starts before it has ended (PDL).

Counts that change from call to call are not specialised: one machine code a layer, the one whose spills are checked.
"""

import triton
import triton.language as tl

from eora_lab.layer.triton_kernels.epilogue import finish
from eora_lab.layer.triton_kernels.planes import dot, load_planes


@triton.jit(do_not_specialize=["M", "counters"])
def down_kernel(
    x_ptr,  # (M, K), rows stride_xm apart
    a_ptr,  # (R, K)
    xa_ptr,  # out: (chunks, M, R) float32, x Aᵀ over each chunk of K
    sums_ptr,  # out: (M, KP / GROUP) float32, x summed over each group
    counters_ptr,  # out: zeros
    counters,
    M,
    K,
    KP,
    R,
    stride_xm,
    chunk,  # channels a program covers, a multiple of 256
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program 0 along axis 0 sums groups, the others take BLOCK_R ranks each; axis 1: chunks of K; axis 2: rows."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    ranks = tl.program_id(0) - 1
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, KP)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, 128)
    rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    if ranks < 0:
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
        r = ranks * BLOCK_R + tl.arange(0, BLOCK_R)
        xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(first, last, 128):
            x = tl.load(rows + (k0 + k)[None, :], mask=(m < M)[:, None] & (k0 + k < K)[None, :], other=0.0)
            a = tl.load(
                a_ptr + r[None, :] * K + (k0 + k)[:, None], mask=(r < R)[None, :] & (k0 + k < K)[:, None], other=0.0
            )
            xa = dot(x, a, xa)
        place = (tl.program_id(1) * M + m)[:, None] * R + r[None, :]
        tl.store(xa_ptr + place, xa, mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["M", "blocks", "chunks"])
def decode_kernel(
    x_ptr,  # (M, K), rows stride_xm apart
    q_ptr,  # packed codes: (blocks * lanes * 16, NP) int16
    scales_ptr,  # (KP / GROUP, NP), or (1, NP) for one group a row
    offsets_ptr,  # like scales: the weight of code 0; or uint8: the zero point
    tiles_ptr,  # (NP / 128, 4) int32: first rank, ranks, first and last + 1 output column of each 128 packed columns
    xa_ptr,  # (chunks, M, R) float32
    sums_ptr,  # (M, KP / SUM) float32
    bt_ptr,  # (most ranks of a tile, NP)
    bias_ptr,  # (NP,), or nothing
    partial_ptr,  # (tiles, SPLIT_K, BLOCK_M, BLOCK_N) float32
    counters_ptr,  # (tiles,) int32, zero
    y_ptr,  # out: (M, N)
    M,
    N,
    K,
    NP,
    R,
    blocks,
    chunks,
    stride_xm,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # channels that share a scale: 16, 32, 64, 128; 0: one scale a row
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether blocks fill K
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Axis 0: BLOCK_N columns; axis 1: every SPLIT_K-th block of K; axis 2: BLOCK_M rows."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PLANES: tl.constexpr = 8 if BITS == 4 else 16
    SUM: tl.constexpr = GROUP if GROUP else 128  # channels of one partial sum
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k16 = tl.arange(0, 16)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(split, blocks, SPLIT_K):
        planes = load_planes(q_ptr, block, n, NP, BITS, DTYPE)
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for j in tl.static_range(PLANES):
            k = block * (16 * PLANES) + 16 * j + k16
            mask = (m < M)[:, None] if EVEN_K else (m < M)[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :], mask=mask, other=0.0)
            part = dot(x, planes[j], part)
            if 16 * (j + 1) % SUM == 0:
                if GROUP:
                    g = block * (16 * PLANES // SUM) + 16 * j // SUM
                    accumulator += part * tl.load(scales_ptr + g * NP + n).to(tl.float32)[None, :]
                else:
                    accumulator += part
                part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    accumulator = correct(
        accumulator, sums_ptr, scales_ptr, offsets_ptr, split, blocks, m, n, M, NP, BITS, GROUP, SUM, PLANES, SPLIT_K
    )
    finish(
        accumulator, tiles_ptr, xa_ptr, bt_ptr, bias_ptr, partial_ptr, counters_ptr, y_ptr,
        m, n, M, N, NP, R, chunks, DTYPE, HAS_BIAS, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip


@triton.jit
def correct(
    accumulator,
    sums_ptr,
    scales_ptr,
    offsets_ptr,
    split,
    blocks,
    m,
    n,
    M,
    NP,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUM: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Scale the accumulator if that was left to the end, and add the group sums times (offset - BASE scale)."""
    SUMS: tl.constexpr = 16 * PLANES // SUM  # a block
    BASE: tl.constexpr = 2**BITS
    sums = sums_ptr + m * (blocks * SUMS)
    if GROUP:
        for block in range(split, blocks, SPLIT_K):
            for i in tl.static_range(SUMS):
                g = block * SUMS + i
                total = tl.load(sums + g, mask=m < M, other=0.0)
                scale = tl.load(scales_ptr + g * NP + n).to(tl.float32)
                accumulator += total[:, None] * shift(scale, offsets_ptr + g * NP + n, BASE)[None, :]
    else:
        total = tl.zeros_like(m).to(tl.float32)
        for block in range(split, blocks, SPLIT_K):
            for i in tl.static_range(SUMS):
                total += tl.load(sums + block * SUMS + i, mask=m < M, other=0.0)
        scale = tl.load(scales_ptr + n).to(tl.float32)
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
