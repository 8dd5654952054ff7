"""GPTQ's tensors against a slow reading of the format, one bit and one weight at a time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eora_lab import EoraLabError
from eora_lab.compress import GridWeight, rtn
from eora_lab.formats.gptq import from_words, read_linear, to_words, write_linear
from eora_lab.formats.gptq_config import BITS, FORMATS, GptqConfig

# 3 bits: (word, bit of the word, bits, first bit of the code) of every piece of the 32 codes in three words
THREE = {j: [(0, 3 * j, 3, 0)] for j in range(10)}
THREE |= {10: [(0, 30, 2, 0), (1, 0, 1, 2)]}
THREE |= {j: [(1, 3 * (j - 11) + 1, 3, 0)] for j in range(11, 21)}
THREE |= {21: [(1, 31, 1, 0), (2, 0, 2, 1)]}
THREE |= {j: [(2, 3 * (j - 22) + 2, 3, 0)] for j in range(22, 32)}


def slow_code(words: list[int], bits: int, index: int) -> int:
    """Code `index` of a row of words."""
    if bits == 3:
        start, j = 3 * (index // 32), index % 32
        return sum((words[start + w] >> bit & (1 << n) - 1) << low for w, bit, n, low in THREE[j])
    word, j = divmod(index, 32 // bits)
    return words[word] >> bits * j & (1 << bits) - 1


def slow_dense(tensors: dict[str, torch.Tensor], bits: int, checkpoint_format: str) -> torch.Tensor:
    """W^ = (q - z) * s[g_idx], one weight at a time."""
    qweight, qzeros, scales, g_idx = (tensors[key].tolist() for key in ("qweight", "qzeros", "scales", "g_idx"))
    dense = torch.empty(len(qweight[0]), len(g_idx))
    for o in range(len(dense)):
        column = [row[o] for row in qweight]
        for i, group in enumerate(g_idx):
            zero = slow_code(qzeros[group], bits, o) + (checkpoint_format == "gptq")
            dense[o, i] = (slow_code(column, bits, i) - zero) * scales[group][o]
    return dense


def weight_of(bits: int, groups: int, sym: bool, shuffled: bool, seed: int = 0) -> GridWeight:
    """A weight (32, 64) that both formats can hold; shuffled: groups of channels from all over."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(32, 64, generator=generator)
    weight = rtn(random, None, bits=bits, group_size=64 // groups, sym=sym, zero_point="integer", scale_dtype="float16")
    if not sym:
        weight = replace(weight, offsets=weight.offsets.clamp_min(1))
    if shuffled:
        order = torch.randperm(64, generator=generator)
        weight = replace(weight, g_idx=(order // (64 // groups)).to(torch.int32))
    return weight


@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_words_hold_codes_where_the_format_says(bits, rows, blocks, seed):
    codes = torch.randint(2**bits, (rows, 32 * blocks), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = to_words(codes, bits)
    assert words.shape == (rows, blocks * bits) and words.dtype == torch.int32
    assert [[slow_code(row, bits, i) for i in range(32 * blocks)] for row in words.tolist()] == codes.tolist()
    assert torch.equal(from_words(words, bits), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("groups", "shuffled"), [(4, False), (4, True), (1, False)])
def test_a_linear_goes_out_and_comes_back(bits, checkpoint_format, sym, groups, shuffled):
    weight = weight_of(bits, groups, sym, shuffled)
    tensors = write_linear(weight, checkpoint_format, "layer")
    assert {key: (str(t.dtype)[6:], tuple(t.shape)) for key, t in tensors.items()} == {
        "qweight": ("int32", (64 * bits // 32, 32)),
        "qzeros": ("int32", (groups, 32 * bits // 32)),
        "scales": ("float16", (groups, 32)),
        "g_idx": ("int32", (64,)),
    }
    torch.testing.assert_close(slow_dense(tensors, bits, checkpoint_format), weight.dense(), rtol=0, atol=0)
    config = GptqConfig(bits, 64 // groups if groups > 1 else -1, sym, shuffled, checkpoint_format)
    read = read_linear(tensors, config, "layer")
    assert torch.equal(read.codes, weight.codes) and torch.equal(read.dense(), weight.dense())
    assert (read.g_idx is None) == (not shuffled)
    stored = GridWeight.from_state_dict(read.state_dict())
    assert torch.equal(stored.dense(), weight.dense())
    assert stored.nbytes == read.nbytes == weight.nbytes


@pytest.mark.parametrize(("bits", "v1", "v2"), [(2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888)])
def test_symmetric_zero_points_are_the_known_words(bits, v1, v2):
    weight = weight_of(bits, 2, sym=True, shuffled=False)
    for checkpoint_format, word in (("gptq", v1), ("gptq_v2", v2)):
        qzeros = write_linear(weight, checkpoint_format, "layer")["qzeros"]
        assert {value & 0xFFFFFFFF for value in qzeros.flatten().tolist()} == {word}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_that_borrowed_from_their_neighbours(bits):
    """GPTQModel stores asymmetric zero points in format "gptq" by taking 1 from each code of a word at once."""
    weight = weight_of(bits, 4, sym=False, shuffled=False)
    weight.offsets[::3] = 0
    tensors = write_linear(weight, "gptq_v2", "layer")
    ones = int("".join(["0" * (bits - 1) + "1"] * (32 // bits)), 2)
    words = [[(word - ones) & 0xFFFFFFFF for word in row] for row in tensors["qzeros"].tolist()]
    tensors["qzeros"] = torch.tensor(words).to(torch.int32)
    assert torch.equal(read_linear(tensors, GptqConfig(bits, 16, False, False), "layer").offsets, weight.offsets)


def test_a_zero_point_of_0_in_3_bits_wraps_within_its_code():
    """GPTQModel works on codes there, not on words: 0 is stored as 7 in format "gptq"."""
    weight = weight_of(3, 4, sym=False, shuffled=False)
    weight.offsets[::3] = 0
    tensors = write_linear(weight, "gptq_v2", "layer")
    tensors["qzeros"] = to_words((from_words(tensors["qzeros"], 3) - 1) & 7, 3)
    assert torch.equal(read_linear(tensors, GptqConfig(3, 16, False, False), "layer").offsets, weight.offsets)


def test_groups_that_do_not_divide_the_channels():
    weight = weight_of(4, 4, sym=True, shuffled=False)
    tensors = write_linear(weight, "gptq", "layer")
    tensors["g_idx"] = torch.arange(64, dtype=torch.int32) // 24  # 24, 24 and 16 channels
    tensors |= {key: tensors[key][:3] for key in ("qzeros", "scales")}
    read = read_linear(tensors, GptqConfig(4, 24, True, False), "layer")
    torch.testing.assert_close(read.dense(), slow_dense(tensors, 4, "gptq"), rtol=0, atol=0)
    again = write_linear(read, "gptq", "layer")
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_g_idx_may_be_left_out_and_scales_may_be_bfloat16():
    weight = weight_of(4, 4, sym=True, shuffled=False)
    tensors = write_linear(weight, "gptq", "layer")
    tensors["scales"] = tensors["scales"].bfloat16()
    expected = slow_dense(tensors, 4, "gptq")
    del tensors["g_idx"]
    assert torch.equal(read_linear(tensors, GptqConfig(4, 16, True, False), "layer").dense(), expected)


def test_a_scale_of_zero_is_a_group_of_zeros():
    weight = weight_of(4, 4, sym=True, shuffled=False)
    weight.scales[3] = 0
    tensors = write_linear(weight, "gptq_v2", "layer")
    assert torch.equal(read_linear(tensors, GptqConfig(4, 16, True, False, "gptq_v2"), "layer").dense(), weight.dense())


@pytest.mark.parametrize(
    "spelling",
    [
        {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "quant_method": "gptq"},
        {"bits": 4, "group_size": 128, "method": "gptq", "format": "gptq", "meta": {}, "dynamic": {"-:.*down.*": {}}},
        {"wbits": 4, "groupsize": 128, "true_sequential": True, "model_file_base_name": "gptq_model-4bit-128g"},
        {"bits": 4, "wbits": 4, "group_size": 128, "damp_percent": 0.01, "rotation": None, "lm_head": False},
        {"w_bit": 4, "q_group_size": 128, "checkpoint_format": "GPTQ", "is_marlin_format": False, "pack_dtype": None},
    ],
)
def test_configurations_of_several_years(spelling):
    assert GptqConfig.from_dict(spelling) == GptqConfig(4, 128, True, False, "gptq")


def test_a_configuration_reads_back():
    config = GptqConfig(3, -1, False, True, "gptq_v2")
    assert "gptq_v2 only" in str(GptqConfig(3, -1, False, True)) and "gptq_v2 only" not in str(config)
    assert GptqConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq' is not read, only gptq"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read, only gptq and gptq_v2"),
        ({"is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ({"bits": 5}, "bits must be one of 2, 3, 4 and 8, not 5"),
        ({"bits": None}, "bits must be one of"),
        ({"group_size": 0}, "group_size must be a positive number or -1, not 0"),
        ({"group_size": "many"}, "group_size must be"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16' is not read"),
        ({"dynamic": {"+:.*q_proj": {"bits": 8}}}, "settings of their own"),
        ({"dynamic": [{"bits": 8}]}, r"dynamic must be names with values, not \[\{'bits': 8\}\]"),
        ({"bits": "4"}, "bits must be a whole number, not '4'"),
        ({"bits": True}, "bits must be a whole number, not True"),
        ({"group_size": "128"}, "group_size must be a whole number, not '128'"),
        ({"sym": "true"}, "sym must be true or false, not 'true'"),
        ({"desc_act": 1}, "desc_act must be true or false, not 1"),
        ({"quant_method": 4}, "quant_method must be text, not 4"),
        ({"wbits": 3}, "wbits is 3, but bits 4: correct the wrong one"),
        ({"format": "gptq_v2", "checkpoint_format": "gptq"}, "format is 'gptq_v2', but checkpoint_format 'gptq'"),
        ({"rotation": "hadamard"}, r"rotation \('hadamard'\) is not known here, and may change what the values mean"),
    ],
)
def test_configurations_that_are_not_read(change, message):
    with pytest.raises(EoraLabError, match=message):
        GptqConfig.from_dict({"bits": 4, "group_size": 128} | change)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("qzeros", lambda t: None, r"lacks layer\.qzeros"),
        ("g_idx", lambda t: None, r"lacks layer\.g_idx"),
        ("qweight", lambda t: t.long(), r"layer\.qweight is torch\.int64, not int32"),
        ("scales", lambda t: t.int(), r"layer\.scales is torch\.int32, not float16"),
        ("qweight", lambda t: t[:-1], r"layer\.qweight \(5, 32\) does not hold 3-bit codes"),
        ("qweight", lambda t: t[:3], r"layer\.qzeros is \(4, 3\), not \(2, 3\)"),
        ("qweight", lambda t: t[:, 0], r"layer\.qweight \(6,\) does not hold"),
        ("scales", lambda t: t[:, :-1], r"layer\.scales is \(4, 31\), not \(4, 32\)"),
        ("g_idx", lambda t: t[1:], r"layer\.g_idx is \(63,\), not \(64,\)"),
        ("scales", lambda t: t * float("inf"), r"layer\.scales has NaN or Inf"),
        ("g_idx", lambda t: t + 1, r"layer\.g_idx names groups beyond the 4"),
        ("g_idx", lambda t: t - 1, r"layer\.g_idx names groups beyond the 4"),
    ],
)
def test_damaged_tensors_are_named(key, change, message):
    tensors = write_linear(weight_of(3, 4, sym=True, shuffled=True), "gptq", "layer")
    tensors[key] = change(tensors[key])
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    with pytest.raises(EoraLabError, match=message):
        read_linear(tensors, GptqConfig(3, 16, True, True), "layer")


def test_a_g_idx_of_zeros_is_none_where_groups_are_neighbours():
    """exllama's sign for "no index"."""
    weight = weight_of(4, 4, sym=True, shuffled=False)
    tensors = write_linear(weight, "gptq", "layer")
    tensors["g_idx"] = torch.zeros(64, dtype=torch.int32)
    assert torch.equal(read_linear(tensors, GptqConfig(4, 16, True, False), "layer").dense(), weight.dense())
    with pytest.raises(EoraLabError, match=r"layer\.g_idx is all zeros though desc_act is true and there are 4 groups"):
        read_linear(tensors, GptqConfig(4, 16, True, True), "layer")


def test_a_g_idx_that_contradicts_the_configuration():
    tensors = write_linear(weight_of(4, 4, sym=True, shuffled=True), "gptq", "layer")
    with pytest.raises(EoraLabError, match=r"layer\.g_idx has groups that are no neighbours, though desc_act is false"):
        read_linear(tensors, GptqConfig(4, 16, True, False), "layer")
    tensors["g_idx"][0] = (tensors["g_idx"][0] + 1) % 4
    with pytest.raises(EoraLabError, match=r"layer\.g_idx has groups of other sizes than group_size 16"):
        read_linear(tensors, GptqConfig(4, 16, True, True), "layer")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("written", "said"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_symmetric_zero_points_tell_the_format(bits, written, said):
    tensors = write_linear(weight_of(bits, 4, sym=True, shuffled=False), written, "layer")
    with pytest.raises(EoraLabError, match=rf"layer: every zero point is .*set it to {written} in the configuration"):
        read_linear(tensors, GptqConfig(bits, 16, True, False, said), "layer")


def test_zero_points_that_symmetric_grids_do_not_have():
    tensors = write_linear(weight_of(4, 4, sym=False, shuffled=False), "gptq_v2", "layer")
    with pytest.raises(EoraLabError, match=r"layer\.qzeros has zero points other than 8, .*set sym to false"):
        read_linear(tensors, GptqConfig(4, 16, True, False, "gptq_v2"), "layer")


@pytest.mark.parametrize(
    ("grid", "shape", "message"),
    [
        ({"bits": 5}, (32, 64), "layer has 5 bits, and GPTQ checkpoints 2, 3, 4 or 8"),
        ({"zero_point": "float"}, (32, 64), "--zero-point integer --scale-dtype float16"),
        (
            {"scale_dtype": "float32"},
            (32, 64),
            "scales that are no float16 .*--scale-dtype float16",
        ),
        ({}, (12, 64), "layer: 12 x 64 codes of 4 bits do not fill 32-bit words"),
    ],
)
def test_grids_that_a_checkpoint_cannot_hold(grid, shape, message):
    grid = {"bits": 4, "zero_point": "integer", "scale_dtype": "float16"} | grid
    weight = rtn(torch.randn(shape, generator=torch.Generator().manual_seed(0)), None, group_size=16, **grid)
    with pytest.raises(EoraLabError, match=message):
        write_linear(weight, "gptq_v2", "layer")


def test_a_zero_point_of_zero_needs_the_second_format():
    weight = weight_of(4, 4, sym=False, shuffled=False)
    weight.offsets[5, 1] = 0
    with pytest.raises(EoraLabError, match="zero points of 0, which format gptq cannot hold: use gptq_v2"):
        write_linear(weight, "gptq", "layer")
    tensors = write_linear(weight, "gptq_v2", "layer")
    assert torch.equal(slow_dense(tensors, 4, "gptq_v2"), weight.dense())
