"""The assembly that unpacks codes, emulated bit by bit: Triton's interpreter cannot run it."""

import re

import numpy as np
import pytest
import torch

from eora_lab.layer.triton_kernels.packing import pack_planes, unpack_planes
from eora_lab.layer.triton_kernels.ptx import LANES, PLANES, constraints, unpack_text

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def emulate(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Run shl, shr and lop3 with the truth table (a & b) | c on 32-bit registers; anything else is an error."""
    registers = {f"${outputs + i}": words.astype(np.uint32) for i, words in enumerate(inputs)}
    body = text.strip().removeprefix("{").removesuffix("}")
    for statement in filter(None, (s.strip() for s in body.split(";"))):
        operation, operands = statement.split(None, 1)
        if operation == ".reg":
            continue
        target, *sources = (o.strip() for o in operands.split(","))
        a, *rest = (registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources)
        if operation == "shl.b32":
            value = a << rest[0]
        elif operation == "shr.b32":
            value = a >> rest[0]
        else:
            assert operation == "lop3.b32" and rest[2] == 0xEA, statement
            value = (a & rest[0]) | rest[1]
        registers[target] = value.astype(np.uint32)
    return [registers[f"${i}"] for i in range(outputs)]


def halves(words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """(2, n): the low and the high 16 bits of registers as floating-point numbers."""
    pairs = words.astype("<u4").view("<u2").reshape(-1, 2).T.astype(np.int32)
    return torch.from_numpy(pairs).to(torch.int16).view(dtype).double()


def pairs_of(lane: torch.Tensor) -> np.ndarray:
    """Rows i and i + 1 of a lane in the low and high half of a register, as `pack=2` hands them over."""
    unsigned = lane.numpy().astype(np.int64) & 0xFFFF
    return (unsigned[1::2] << 16 | unsigned[0::2]).reshape(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 4])
def test_every_code_comes_out_as_base_plus_code(bits: int, dtype: str):
    """Every 16-bit word in every lane, through the layout of `pack_planes` and back through the assembly."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (128, 16 * PLANES[bits] * 40), generator=generator, dtype=torch.uint8)
    lanes = pack_planes(codes, bits).view(40, LANES[bits], 16, 128)
    inputs = [pairs_of(lanes[:, lane].reshape(-1, 128)) for lane in range(LANES[bits])]
    outputs = emulate(unpack_text(bits, dtype), inputs, PLANES[bits])
    expected = codes.T.view(40, PLANES[bits], 8, 2, 128).double() + 2**bits  # channel 16 p + 2 i + half
    for plane, words in enumerate(outputs):
        low, high = halves(words, DTYPES[dtype]).view(2, 40, 8, 128)
        assert torch.equal(low, expected[:, plane, :, 0]) and torch.equal(high, expected[:, plane, :, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 4])
def test_each_word_alone(bits: int, dtype: str):
    """All 2^16 words in one lane, the other lanes and the other half at random: no bit leaks into a neighbour."""
    random = np.random.default_rng(bits)
    words = np.arange(2**16, dtype=np.uint32)
    for lane in range(LANES[bits]):
        inputs = [random.integers(0, 2**32, 2**16, dtype=np.uint32) for _ in range(LANES[bits])]
        inputs[lane] = inputs[lane] & np.uint32(0xFFFF0000) | words
        low = [(i & 0xFFFF).astype(np.int64) for i in inputs]
        fields = [(low[j] >> (bits * f)) & (2**bits - 1) for j in range(LANES[bits]) for f in range(16 // bits)]
        if bits == 3:
            fields.append(sum((low[j] >> 15) << j for j in range(3)))
        for code, out in zip(fields, emulate(unpack_text(bits, dtype), inputs, PLANES[bits]), strict=True):
            assert (halves(out, DTYPES[dtype])[0].numpy() == code + 2**bits).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_registers_are_those_of_the_text(bits: int):
    used = {int(r) for r in re.findall(r"\$(\d+)", unpack_text(bits, "fp16"))}
    assert used == set(range(PLANES[bits] + LANES[bits]))
    assert constraints(bits).split(",") == ["=r"] * PLANES[bits] + ["r"] * LANES[bits]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (129, 300), (128, 256)])
def test_packing_is_undone(bits: int, shape: tuple[int, int]):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = pack_planes(codes, bits)
    assert torch.equal(unpack_planes(packed, bits, *shape), codes)
    if shape == (128, 256):
        assert packed.nbytes * 8 == codes.numel() * bits
