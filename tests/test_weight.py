"""Packed storage: exact round trips, and as few bytes as it says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eora_lab.compress import (
    CodebookWeight,
    DenseWeight,
    GridWeight,
    SparseWeight,
    tagged_state_dict,
    weight_from_state_dict,
)
from eora_lab.compress.packing import pack, pack_kept, pack_mask, unpack, unpack_kept, unpack_mask
from eora_lab.errors import EoraLabError


def random_mask(pattern: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """ "2:4" keeps two of every four; "0.5" keeps every weight with that probability; "0": nothing."""
    if ":" not in pattern:
        return torch.rand(rows, columns, generator=generator) < float(pattern)
    n, m = map(int, pattern.split(":"))
    return (torch.rand(rows, columns // m, m, generator=generator).argsort(-1) < n).flatten(1)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 77), st.integers(0, 2**32 - 1))
def test_codes_are_a_little_endian_bit_stream_in_every_row(bits, rows, columns, seed):
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    planes = np.unpackbits(codes.numpy()[..., None], axis=-1, count=bits, bitorder="little").reshape(rows, -1)
    assert np.array_equal(packed.numpy(), np.packbits(planes, axis=1, bitorder="little"))
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "0.5", "0", "1"])
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_masks_are_positions_or_bitmaps(pattern, rows, eights, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(pattern, rows, 8 * eights, generator)
    packed, n = pack_mask(mask)
    assert torch.equal(unpack_mask(packed, n, 8 * eights), mask)
    if pattern in ("2:4", "1:4"):
        assert n == int(pattern[0])
    bits_per_weight = n / 2 or 1  # n positions of 2 bits in every four; an unstructured mask can have them by chance
    assert packed.shape[1] == -(-8 * eights * bits_per_weight // 8)
    matrix = torch.randn(mask.shape, generator=generator)
    assert torch.equal(unpack_kept(pack_kept(matrix, mask), mask), torch.where(mask, matrix, 0))


@pytest.mark.parametrize("pattern", [None, "2:4", "1:4", "4:8", "0.3", "0"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("offsets", ["integer", "float"])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 16), (72, 32), (20, 20)])
def test_round_trip_through_the_state_dict(pattern, bits, offsets, columns, group_size):
    if bits == 16 and pattern is None:
        pytest.skip("nothing is compressed")
    generator = torch.Generator().manual_seed(bits)
    if pattern == "4:8" and columns % 8:
        pattern = "0.5"
    mask = random_mask(pattern, 12, columns, generator) if pattern else None
    scales = torch.rand(12, -(-columns // group_size), generator=generator).half() + 0.1
    if bits == 16:
        weight = SparseWeight(torch.randn(12, columns, generator=generator).half(), mask)
    else:
        codes = torch.randint(2**bits, (12, columns), generator=generator, dtype=torch.uint8)
        if offsets == "integer":
            offset = torch.randint(2**bits, scales.shape, generator=generator, dtype=torch.uint8)
        else:
            offset = torch.randn(scales.shape, generator=generator).half()
        weight = GridWeight(codes if mask is None else codes * mask, scales, offset, bits, mask, group_size)
    state = tagged_state_dict(weight)
    assert weight.nbytes == sum(tensor.nbytes for name, tensor in state.items() if name not in ("layout", "kind"))
    loaded = weight_from_state_dict(state)
    assert torch.equal(loaded.dense(), weight.dense()) and loaded.shape == weight.shape == (12, columns)
    assert all(torch.equal(tensor, tagged_state_dict(loaded)[name]) for name, tensor in state.items())
    part = {name: tensor if name in ("kind", *weight.whole) else tensor[3:7] for name, tensor in state.items()}
    assert torch.equal(weight_from_state_dict(part).dense(), weight.dense()[3:7])
    with pytest.raises(EoraLabError, match="stored as 'grit', which is not known"):
        weight_from_state_dict(state | {"kind": torch.tensor(list(b"grit"), dtype=torch.uint8)})
    if mask is not None:
        assert (weight.dense()[~mask] == 0).all()


def test_dense_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (2, 5), generator=generator, dtype=torch.uint8)
    scales, zeros = torch.rand(2, 2, generator=generator), torch.tensor([[1, 7], [0, 3]], dtype=torch.uint8)
    dense = GridWeight(codes, scales, zeros, 3, group_size=4).dense()
    for o in range(2):
        for i in range(5):
            assert dense[o, i] == scales[o, i // 4] * (int(codes[o, i]) - int(zeros[o, i // 4]))
    low = GridWeight(codes, scales, -zeros.float() * scales, 3, group_size=4).dense()
    torch.testing.assert_close(low, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "pattern", "expected"),
    [
        (3, None, 3 + 16 / 64 + 3 / 64),
        (4, None, 4 + 16 / 64 + 4 / 64),
        (4, "2:4", 2 + 1 + 16 / 64 + 4 / 64),
        (2, "1:4", 0.5 + 0.5 + 16 / 64 + 2 / 64),
        (16, "2:4", 8 + 1),
    ],
)
def test_bits_a_weight(bits, pattern, expected):
    mask = random_mask(pattern, 32, 512, torch.Generator().manual_seed(0)) if pattern else None
    if bits == 16:
        weight = SparseWeight(torch.ones(32, 512).half(), mask)
    else:
        zeros = torch.zeros(32, 8, dtype=torch.uint8)
        weight = GridWeight(torch.zeros(32, 512, dtype=torch.uint8), zeros.half() + 1, zeros, bits, mask)
    assert 8 * weight.nbytes / (32 * 512) == pytest.approx(expected)


@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.sampled_from([1, 7, 16, 32]),
    st.sampled_from([torch.float32, torch.float16, torch.float8_e4m3fn]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_codebook_weight_is_its_levels_times_scales_and_survives_its_file(bits, columns, size, dtype, divided, seed):
    random = torch.Generator().manual_seed(seed)
    levels = torch.randn(2**bits, generator=random)
    codes = torch.randint(2**bits, (5, columns), generator=random, dtype=torch.uint8)
    scales = (torch.rand(5, -(-columns // size), generator=random) + 0.1).to(dtype)
    weight = CodebookWeight(codes, levels, scales, bits, size, torch.tensor([3.0]) if divided else None)
    by_element = scales.float() / 3 if divided else scales.float()
    wanted = levels[codes.long()] * by_element.repeat_interleave(size, 1)[:, :columns]
    assert torch.equal(weight.dense(), wanted)
    state = tagged_state_dict(weight)
    rows = {name: part if name in (*weight.whole, "kind") else part[1:3] for name, part in state.items()}
    for read, expected in ((weight_from_state_dict(state), wanted), (weight_from_state_dict(rows), wanted[1:3])):
        assert torch.equal(read.dense(), expected) and read.shape == expected.shape
    assert state["codes"].shape == (5, -(-columns * bits // 8)) and state["scales"].dtype == dtype


def test_a_dense_weight_keeps_its_values_and_their_type():
    values = torch.randn(4, 6).bfloat16()
    state = tagged_state_dict(DenseWeight(values))
    read = weight_from_state_dict(state)
    assert torch.equal(read.dense(torch.bfloat16), values) and read.bits == 16 and read.nbytes == 48
