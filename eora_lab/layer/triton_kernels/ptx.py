"""The assembly that turns packed codes into floating-point numbers: one shift and one LOP3 for two weights.

A 16-bit float of the shape 2^bits * (1 + mantissa) with a code in the top bits of its mantissa is 2^bits + code,
exactly. So a code is moved to that place and the exponent is OR-ed in; no integer is ever converted. What is added,
BASE = 2^bits, is taken off again by sums of x (see `decode`). Text only, so that it can be checked without a GPU.
"""

EXPONENT = {(4, "fp16"): 0x4C00, (3, "fp16"): 0x4800, (4, "bf16"): 0x4180, (3, "bf16"): 0x4100}  # of 16.0 and 8.0
MANTISSA = {"fp16": 10, "bf16": 7}
LANES = {4: 2, 3: 3}  # 16-bit words that hold one row of a block
PLANES = {4: 8, 3: 16}  # codes in them


def twice(half: int) -> str:
    """The same 16 bits in both halves of a register."""
    return f"{half << 16 | half:#010x}"


def unpack_text(bits: int, dtype: str) -> str:
    """PTX that reads `LANES` registers, two words each, and writes `PLANES` registers, two values BASE + code each.

    Lane L holds the codes of planes 5L .. 5L+4 (4 bits: 4L .. 4L+3) from its lowest bit up. At 3 bits the three spare
    bits, the top one of each lane, are plane 15. dtype: "fp16" or "bf16".
    """
    lanes, planes, fields = LANES[bits], PLANES[bits], 16 // bits
    place = MANTISSA[dtype] - bits  # lowest bit of the code in the value
    mask, exponent = twice((2**bits - 1) << place), twice(EXPONENT[bits, dtype])
    lines = []
    for plane in range(lanes * fields):
        shift = place - bits * (plane % fields)
        lines += [
            f"{'shl' if shift > 0 else 'shr'}.b32 t, ${planes + plane // fields}, {abs(shift)};",
            f"lop3.b32 ${plane}, t, {mask}, {exponent}, 0xEA;",  # (t & mask) | exponent
        ]
    if bits == 3:
        for bit in range(3):
            before, after = exponent if bit == 0 else "u", "$15" if bit == 2 else "u"
            lines += [
                f"shr.b32 t, ${planes + bit}, {15 - place - bit};",
                f"lop3.b32 {after}, t, {twice(1 << (place + bit))}, {before}, 0xEA;",
            ]
    return "{ .reg .b32 t, u;\n" + "\n".join(lines) + "\n}"


def constraints(bits: int) -> str:
    """Registers of `unpack_text`: outputs first, then inputs."""
    return ",".join(["=r"] * PLANES[bits] + ["r"] * LANES[bits])
