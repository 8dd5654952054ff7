"""Decoding with a 2:4 weight: of every four weights two values and their places, expanded in registers.

9 bits a weight are read instead of 16. Channel j of every group of four makes a plane; x is split to match.
"""

import triton
import triton.language as tl

from eora_lab.triton_kernels.epilogue import finish
from eora_lab.triton_kernels.planes import dot


@triton.jit(do_not_specialize=["M", "blocks", "chunks"])
def sparse_decode_kernel(
    x_ptr,  # (M, K), rows stride_xm apart
    values_ptr,  # (2, KP / 4, NP): the first and the second kept weight of each four
    places_ptr,  # (KP / 16, NP) int16: of four groups of four, the channels of both
    tiles_ptr,  # the rest as in decode_kernel
    xa_ptr,
    bt_ptr,
    bias_ptr,
    partial_ptr,
    counters_ptr,
    y_ptr,
    M,
    N,
    K,
    NP,
    R,
    blocks,  # of 256 channels
    chunks,
    stride_xm,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Axis 0: BLOCK_N columns; axis 1: every SPLIT_K-th block of K; axis 2: BLOCK_M rows."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, 16)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.program_id(1), blocks, SPLIT_K):
        words = tl.load(places_ptr + (block * 16 + i)[:, None] * NP + n[None, :]).to(tl.int32)
        for f in tl.static_range(4):
            group = block * 64 + f * 16 + i
            values = values_ptr + group[:, None] * NP + n[None, :]
            first = tl.load(values)
            second = tl.load(values + blocks * 64 * NP)
            place = words >> (4 * f)
            k = block * 256 + f * 64 + tl.arange(0, 64)
            mask = (m < M)[:, None] if EVEN_K else (m < M)[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :], mask=mask, other=0.0)
            even, odd = tl.split(tl.reshape(x, (BLOCK_M, 16, 2, 2)))  # channel 2 a + b of a group: split by b, then a
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            accumulator = dot(x0, expand(first, second, place, 0), accumulator)
            accumulator = dot(x1, expand(first, second, place, 1), accumulator)
            accumulator = dot(x2, expand(first, second, place, 2), accumulator)
            accumulator = dot(x3, expand(first, second, place, 3), accumulator)
    if PDL:
        tl.extra.cuda.gdc_wait()
    finish(
        accumulator, tiles_ptr, xa_ptr, bt_ptr, bias_ptr, partial_ptr, counters_ptr, y_ptr,
        m, n, M, N, NP, R, chunks, DTYPE, HAS_BIAS, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip


@triton.jit
def expand(first, second, place, CHANNEL: tl.constexpr):
    """The weights of one channel of every four: the kept one that stands there, or zero."""
    zero = tl.zeros_like(first)
    return tl.where((place & 3) == CHANNEL, first, tl.where(((place >> 2) & 3) == CHANNEL, second, zero))
