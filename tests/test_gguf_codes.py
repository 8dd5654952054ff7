"""Codes in GGUF blocks, by gguf's own dequantisation."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eora_lab.compress.gguf_codes import LAYOUTS


def random_rows(kind: str, rows: int, blocks: int, random: np.random.Generator) -> np.ndarray:
    """Bytes of random codes with scales that are small numbers."""
    size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    layout = LAYOUTS[kind]
    assert (layout.block_size, layout.block_bytes) == (size, block_bytes)
    raw = random.integers(0, 256, (rows * blocks, block_bytes), dtype=np.uint8)
    numbers = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82]}
    numbers |= {"Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
    for place in numbers[kind]:
        raw[:, place : place + 2] = random.normal(0, 0.1, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def values(raw: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", [kind for kind, layout in LAYOUTS.items() if layout.even])
@given(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_codes_are_read_and_changed_in_place(kind, rows, blocks, seed):
    random, layout = np.random.default_rng(seed), LAYOUTS[kind]
    raw = random_rows(kind, rows, blocks, random)
    assert np.array_equal(layout.with_codes(raw, layout.codes(raw)), raw)
    codes = random.integers(0, 2**layout.bits, layout.codes(raw).shape, dtype=np.uint8)
    changed = layout.with_codes(raw, codes)
    assert np.array_equal(layout.codes(changed), codes)
    # a weight is origin + step * code, the same of both in a group, by what gguf makes of the bytes
    low, high = (values(layout.with_codes(raw, np.full_like(codes, c)), kind) for c in (0, 2**layout.bits - 1))
    step = (high - low) / (2**layout.bits - 1)
    assert np.allclose(
        values(changed, kind), low + step * codes, rtol=0, atol=1e-5 * (np.abs(low) + np.abs(high)).max()
    )
    grouped = step.reshape(rows, -1, layout.group_size)
    assert np.allclose(grouped, grouped[..., :1], rtol=1e-3, atol=1e-6)
