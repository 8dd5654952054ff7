"""Triton: load one block of packed codes and unpack it, plane by plane.

A plane is 16 consecutive input channels, the K of one tensor-core step. Interpreted (TRITON_INTERPRET=1, set before
this module is imported) the codes are unpacked portably and products are taken in float32: the interpreter runs no
assembly and multiplies the raw bits of bfloat16.
"""

import os

import triton
import triton.language as tl

from eora_lab.layer.triton_kernels.ptx import LANES, PLANES, constraints, unpack_text

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

W4_FP16, W4_BF16 = (tl.constexpr(unpack_text(4, dtype)) for dtype in ("fp16", "bf16"))
W3_FP16, W3_BF16 = (tl.constexpr(unpack_text(3, dtype)) for dtype in ("fp16", "bf16"))
W4_REGISTERS, W3_REGISTERS = (tl.constexpr(constraints(bits)) for bits in (4, 3))
W4_LANES, W3_LANES = tl.constexpr(LANES[4]), tl.constexpr(LANES[3])
FP16_8, FP16_16 = (tl.constexpr((tl.float16,) * PLANES[bits]) for bits in (4, 3))
BF16_8, BF16_16 = (tl.constexpr((tl.bfloat16,) * PLANES[bits]) for bits in (4, 3))


@triton.jit
def unpack_portably(words, LANE: tl.constexpr, BITS: tl.constexpr):
    """The planes of one lane as float32, BASE + code: what the assembly does, for the interpreter."""
    word = words[LANE].to(tl.int32)
    fields = ()
    for f in tl.static_range(16 // BITS):
        fields += ((((word >> (BITS * f)) & (2**BITS - 1)) + 2**BITS).to(tl.float32),)  # type: ignore[assignment]
    return fields


@triton.jit
def load_planes(q_ptr, block, columns, NP, BITS: tl.constexpr, dtype: tl.constexpr):
    """A tuple of 8 (4 bits) or 16 (3 bits) planes (16, columns) of the block, in dtype: BASE + code."""
    LANES_: tl.constexpr = W4_LANES if BITS == 4 else W3_LANES
    row = block * (16 * LANES_) + tl.arange(0, 16)
    pointers = q_ptr + row[:, None] * NP + columns[None, :]
    a = tl.load(pointers)
    b = tl.load(pointers + 16 * NP)
    if BITS == 4:
        if INTERPRETED:
            return unpack_portably((a, b), 0, 4) + unpack_portably((a, b), 1, 4)
        elif dtype == tl.float16:
            return tl.inline_asm_elementwise(W4_FP16, W4_REGISTERS, [a, b], dtype=FP16_8, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(W4_BF16, W4_REGISTERS, [a, b], dtype=BF16_8, is_pure=True, pack=2)
    else:
        c = tl.load(pointers + 32 * NP)
        if INTERPRETED:
            w = (a, b, c)
            spare = tl.zeros_like(a).to(tl.int32)
            for lane in tl.static_range(3):
                spare |= ((w[lane].to(tl.int32) >> 15) & 1) << lane
            return (
                unpack_portably(w, 0, 3)
                + unpack_portably(w, 1, 3)
                + unpack_portably(w, 2, 3)
                + ((spare + 8).to(tl.float32),)
            )
        elif dtype == tl.float16:
            return tl.inline_asm_elementwise(W3_FP16, W3_REGISTERS, [a, b, c], dtype=FP16_16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(W3_BF16, W3_REGISTERS, [a, b, c], dtype=BF16_16, is_pure=True, pack=2)


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a @ b in float32 on the tensor cores; a and b are 16-bit values."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator)
