"""Grids of deployed formats: rounding and scales by their rules and by their own tools, GPTQ on them, runs of them."""

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eora_lab import EoraLabError, InputStatistics, Recipe, load_model, load_run
from eora_lab.compress import GRIDS, CodebookWeight, gptq, rtn, tagged_state_dict, weight_from_state_dict
from eora_lab.experiment.cells import Cell
from eora_lab.layer.linear import compensated
from eora_lab.run.given import check_given
from tests.layers import output_error, statistics_of, weight_of
from tests.tiny import compress, logits, save_tiny, tiny_tokens

BITS = {"nf4": 4.5, "mxfp4": 4.25, "nvfp4": 4.5, "fp8": 8, "q4_0": 4.5, "q8_0": 8.5}
every_grid = pytest.mark.parametrize("grid", GRIDS)
seeds = st.integers(0, 2**32 - 1)


def effective(weight: CodebookWeight) -> torch.Tensor:
    """What the levels of every weight are multiplied by, (out, in)."""
    scales = weight.scales.float() if weight.tensor_scale is None else weight.scales.float() / weight.tensor_scale
    return scales.repeat_interleave(weight.group_size, 1)[:, : weight.shape[1]]


@every_grid
@given(st.integers(1, 90), st.sampled_from([1e-20, 1e-3, 1.0, 900.0]), st.booleans(), seeds)
def test_no_other_level_is_nearer(grid, columns, size, mse, seed):
    weight = weight_of(4, columns, seed) * size
    weight[0] *= 30
    weight[1, : columns // 2] = 0
    found = rtn(weight, None, grid=grid, mse=mse)
    scales = effective(found)
    points = found.levels * scales[..., None]  # every level, tried one by one
    nearest = (weight[..., None] - points).abs().amin(-1)
    # GGUF's integers are found with the scale that float16 then rounds, by at most 2^-11 or half of its smallest step
    slack = 128 * (2.0**-10 * scales.abs() + 2.0**-24) if grid in ("q4_0", "q8_0") else 1e-6 * (scales.abs() * 8)
    assert ((weight - found.dense()).abs() <= nearest + slack).all()
    assert (found.dense()[weight == 0] == 0).all()


@every_grid
@given(seeds)
def test_rounded_weights_stay_as_they_are(grid, seed):
    once = rtn(weight_of(4, 96, seed), None, grid=grid).dense()
    torch.testing.assert_close(rtn(once, None, grid=grid).dense(), once, rtol=1e-6, atol=0)


@every_grid
@given(seeds)
def test_a_shorter_last_group_is_one_filled_with_zeros(grid, seed):
    weight = weight_of(3, 40, seed)
    filled = torch.nn.functional.pad(weight, (0, 24))
    assert torch.equal(rtn(weight, None, grid=grid).dense(), rtn(filled, None, grid=grid).dense()[:, :40])


@every_grid
@given(st.floats(-45, 38), seeds)
def test_weights_of_any_size_are_near_or_refused(grid, power, seed):
    weight = (weight_of(2, 64, seed) * 10.0**power).clamp(-3e38, 3e38)
    try:
        dense = rtn(weight, None, grid=grid).dense()
    except EoraLabError as error:
        assert grid in ("q4_0", "q8_0") and weight.abs().max() > 65504 and "too large for the scales" in str(error)
        return
    assert dense.isfinite().all()
    if weight.abs().max() > (1e-3 if grid in ("q4_0", "q8_0") else 1e-30):
        assert (weight - dense).double().norm() < 0.2 * weight.double().norm()


@every_grid
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(grid, bad):
    weight = weight_of(2, 64)
    weight[1, 7] = bad
    with pytest.raises(EoraLabError, match="weights are not finite"):
        rtn(weight, None, grid=grid)


@given(seeds, st.sampled_from([1e-4, 1.0, 50.0]))
def test_scales_follow_the_rule_of_their_format(seed, size):
    weight = weight_of(6, 128, seed) * size
    weight[0] = 0
    largest = {n: weight.view(6, -1, n).abs().amax(-1) for n in (16, 32, 64, 128)}
    found = {grid: rtn(weight, None, grid=grid) for grid in GRIDS}
    assert torch.equal(found["nf4"].scales, largest[64])
    exponents = (torch.log2(largest[32][1:].double()).floor() - 2 + 127).to(torch.uint8)
    assert torch.equal(found["mxfp4"].scales.view(torch.uint8)[1:], exponents)
    assert (found["mxfp4"].scales.view(torch.uint8)[0] == 0).all()
    tensor_scale = found["nvfp4"].tensor_scale
    assert tensor_scale.log2() == (448 * 6 / weight.abs().max()).log2().floor()
    scales = (tensor_scale * (largest[16] / 6)).to(torch.float8_e4m3fn).float()
    assert torch.equal(found["nvfp4"].scales.float(), torch.where(scales == 0, 0.125, scales))
    assert torch.equal(found["fp8"].scales[1:], largest[128][1:] / 448)
    assert torch.equal(found["q4_0"].scales.abs(), (largest[32] / 8).half())
    assert torch.equal(found["q8_0"].scales, (largest[32] / 127).half())
    assert all((one.dense()[0] == 0).all() for one in found.values())


@pytest.mark.parametrize("grid", ["q4_0", "q8_0", "mxfp4"])
@given(st.sampled_from([1e-6, 1e-2, 1.0, 300.0]), seeds)
def test_gguf_rounds_alike(grid, size, seed):
    weight = weight_of(8, 96, seed) * size
    weight[2] = 0
    kind = gguf.GGMLQuantizationType[grid.upper()]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    assert torch.equal(rtn(weight, None, grid=grid).dense(), torch.from_numpy(theirs.copy()))


@given(st.sampled_from([1e-38, 1e-2, 1.0, 3e4]), seeds)
def test_bitsandbytes_rounds_alike(size, seed):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = weight_of(4, 128, seed) * size
    weight[2] = 0
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    assert torch.equal(rtn(weight, None, grid="nf4").dense(), theirs)


@pytest.mark.parametrize("grid", ["nvfp4", "mxfp4", "fp8"])
@given(st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1e-3, 1.0, 3e4]), seeds)
def test_compressed_tensors_rounds_alike(grid, dtype, size, seed):
    """Numbers in bfloat16 often lie right between two levels."""
    reason = "compressed-tensors is not installed"
    compressors = pytest.importorskip("compressed_tensors.compressors", reason=reason)
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    preset, stored = {
        "nvfp4": ("NVFP4A16", "nvfp4-pack-quantized"),
        "mxfp4": ("MXFP4A16", "mxfp4-pack-quantized"),
        "fp8": ("FP8_DYNAMIC", "float-quantized"),
    }[grid]
    weight = (weight_of(8, 128, seed) * size).to(dtype).float()
    weight[2] = 0
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    groups = weight.view(8, -1, scheme.weights.group_size or 128)
    found = rtn(weight, None, grid=grid)
    tensor_scale = found.tensor_scale
    scales, _ = quantization.utils.calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, tensor_scale)
    state = {"weight": weight, "weight_scale": scales}
    state |= {} if tensor_scale is None else {"weight_global_scale": tensor_scale}
    compressor = compressors.BaseCompressor.get_value_from_registry(stored)
    theirs = compressor.decompress(compressor.compress(state, scheme), scheme)["weight"]
    equal = found.dense(theirs.dtype) == theirs
    if grid == "mxfp4":  # it rounds largest weights from 1.75 times a power of two upwards to the next power
        equal |= (groups.abs().amax(-1).frexp().mantissa >= 1.75 / 2).repeat_interleave(32, 1)
    assert equal.all()


@every_grid
@given(seeds)
def test_the_search_never_adds_to_the_squared_error(grid, seed):
    weight = weight_of(4, 128, seed) ** 3
    plain, searched = (rtn(weight, None, grid=grid, mse=mse).dense() for mse in (False, True))
    assert (weight - searched).square().sum() <= 1.0001 * (weight - plain).square().sum()


def test_the_search_helps_the_formats_of_four_bits():
    weight = weight_of(16, 256)
    for grid in ("nf4", "mxfp4", "nvfp4", "q4_0"):
        plain, searched = (rtn(weight, None, grid=grid, mse=mse).dense() for mse in (False, True))
        assert (weight - searched).square().sum() < 0.97 * (weight - plain).square().sum()


@every_grid
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("mse", [True, False])
def test_gptq_beats_rtn_where_inputs_are_correlated_and_is_rtn_where_not(grid, desc_act, mse):
    weight, statistics = weight_of(32, 160), statistics_of(160)
    better, plain = gptq(weight, statistics, grid=grid, desc_act=desc_act, mse=mse), rtn(weight, None, grid=grid)
    assert output_error(weight, better, statistics) < 0.8 * output_error(weight, plain, statistics)
    assert better.scales.dtype == plain.scales.dtype and better.bits == plain.bits and better.nbytes == plain.nbytes
    identity = InputStatistics.from_second_moment(torch.eye(160))
    alone = gptq(weight, identity, grid=grid, desc_act=desc_act, mse=mse)
    assert torch.equal(alone.dense(), rtn(weight, None, grid=grid, mse=mse).dense())


@every_grid
def test_gptq_stays_on_the_grid_with_dead_channels_and_a_zero_group(grid):
    statistics, weight = statistics_of(128, tokens=20), weight_of(8, 128)
    statistics.second_moment[7] = statistics.second_moment[:, 7] = 0
    weight[:, 64:] = 0
    found = gptq(weight, statistics, grid=grid)
    assert found.dense().isfinite().all() and (found.dense()[:, 7] == 0).all()
    points = found.levels * effective(found)[..., None]
    assert ((found.dense()[..., None] - points).abs().amin(-1) == 0).all()


@every_grid
def test_the_file_holds_the_weight_and_the_bits_of_the_format(grid):
    found = rtn(weight_of(32, 256), None, grid=grid)
    loaded = weight_from_state_dict(tagged_state_dict(found))
    assert torch.equal(loaded.dense(), found.dense()) and loaded.scales.dtype == found.scales.dtype
    more = {"fp8": 32 * 4, "nvfp4": 4}.get(grid, 0)  # a float32 scale a row, and one for the tensor
    assert found.nbytes == BITS[grid] * 32 * 256 / 8 + more


def test_settings_that_contradict_a_format_are_refused():
    settled = Recipe("rtn", grid="mxfp4")
    assert (settled.bits, settled.group_size, settled.base) == (4, 32, "rtn mxfp4")
    assert Recipe("gptq", bits=8, group_size=-1, grid="fp8").base == "gptq fp8"
    assert (Recipe().bits, Recipe().group_size) == (4, 64)
    for settings, message in (
        ({"grid": "nf4", "bits": 3}, "nf4 has bits 4, not 3: leave bits out, or use grid integer"),
        ({"grid": "nvfp4", "group_size": 64}, "nvfp4 has group_size 16, not 64"),
        ({"grid": "fp8", "sym": True}, "fp8 has scales and levels of its own: leave sym out"),
        ({"grid": "q4_0", "scale_dtype": "float16"}, "leave scale_dtype out"),
        ({"grid": "nf5"}, r"unknown grid 'nf5'.*did you mean nf4"),
    ):
        with pytest.raises(EoraLabError, match=message):
            Recipe("rtn", **settings)
        with pytest.raises(EoraLabError, match=message):
            rtn(weight_of(2, 64), None, **settings)
    with pytest.raises(EoraLabError, match="wanda cannot round to nf4: use rtn or gptq, or leave grid out"):
        Recipe("wanda", sparsity="2:4", grid="nf4")


@pytest.mark.parametrize("only", ["", "mlp"])
def test_a_cell_names_its_grid_where_it_is_a_format(only):
    plain = Cell.from_config({"compressor": "rtn", "only": only})
    assert "grid" not in plain.config() and plain.config()["bits"] == 4
    assert Cell.from_config(plain.config() | {"grid": "integer"}).config() == plain.config()
    cell = Cell.from_config({"compressor": "rtn", "only": only, "grid": "fp8"})
    assert cell.config() == plain.config() | {"grid": "fp8", "bits": 8, "group_size": -1}
    assert Cell.from_config(cell.config()) == cell


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_grid
def test_a_run_loads_back_with_its_bytes(grid, dtype, tmp_path):
    source = save_tiny(tmp_path / "model")
    model = load_model(source, dtype=dtype)[0]
    report = compress(
        model, tiny_tokens(), "gptq", bits=None, grid=grid, rank=4, folder=tmp_path / "run", progress=False
    )
    layers = compensated(model)
    assert all(isinstance(layer.compressed, CodebookWeight) for layer in layers.values())
    assert report.nbytes == sum(layer.compressed.nbytes + layer.factors.nbytes for layer in layers.values())
    loaded = load_run(tmp_path / "run", dtype)[0]
    for name, layer in compensated(loaded).items():
        assert torch.equal(layer.dense(), layers[name].dense())
    assert torch.equal(logits(loaded, tiny_tokens()), logits(model, tiny_tokens()))
    original = load_model(source, dtype=dtype)[0]
    assert len(check_given(original, {name: layer.compressed for name, layer in layers.items()}, progress=False)) == 64
