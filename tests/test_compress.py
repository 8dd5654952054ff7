"""All compressors: storage, grids and errors; round to nearest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eora_lab import EoraLabError
from eora_lab.compress import COMPRESSORS, PRUNERS, rtn, tagged_state_dict, weight_from_state_dict
from eora_lab.compress.grid import Grid
from eora_lab.compress.grid_weight import zero_points
from eora_lab.run.fit import taken
from tests.layers import statistics_of, weight_of

GRIDS = [name for name, compressor in COMPRESSORS.items() if "bits" in taken(compressor, {"bits": 4})]


def compress(name, weight, statistics, **settings):
    """Run a compressor with those settings that it takes; pruners to 2:4."""
    settings |= {"sparsity": "2:4"} if name in PRUNERS else {}
    return COMPRESSORS[name](weight, statistics, **taken(COMPRESSORS[name], settings))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("zero_point", ["float", "integer"])
def test_state_dict_round_trip(name, bits, zero_point, scale_dtype):
    grid = {"bits": bits, "group_size": 16, "zero_point": zero_point, "scale_dtype": scale_dtype}
    compressed = compress(name, weight_of(12, 64), statistics_of(64), **grid)
    loaded = weight_from_state_dict(tagged_state_dict(compressed))
    assert torch.equal(loaded.dense(), compressed.dense())
    assert loaded.nbytes == compressed.nbytes


@given(
    st.integers(2, 8),
    st.sampled_from([4, 8, 32, -1]),
    st.booleans(),
    st.sampled_from(["float", "integer"]),
    st.integers(0, 2**32 - 1),
)
def test_rtn_is_the_nearest_point_of_its_grid(bits, group_size, sym, zero_point, seed):
    weight = weight_of(6, 32, seed)
    compressed = rtn(weight, None, bits=bits, group_size=group_size, sym=sym, zero_point=zero_point)
    groups = compressed.scales.shape[1]
    assert groups == 32 // (32 if group_size == -1 else group_size)
    levels = torch.arange(2**bits).float()  # every point of the grid, tried one by one
    grid = (levels - zero_points(compressed.scales, compressed.offsets)[..., None]) * compressed.scales.float()[
        ..., None
    ]  # (out, groups, levels)
    distance = (weight.view(6, groups, -1, 1) - grid[:, :, None]).abs().amin(-1)
    actual = (weight - compressed.dense()).abs().view(6, groups, -1)
    torch.testing.assert_close(actual, distance, rtol=1e-4, atol=1e-6)


def test_float_zero_points_keep_the_ends_and_integer_ones_keep_zero():
    weight = weight_of(16, 64)
    weight[:, 5] = 0
    ends = rtn(weight, None, bits=4, group_size=64, zero_point="float").dense()
    step = (weight.amax(1) - weight.amin(1)) / 15
    for end in ("amin", "amax"):
        assert ((getattr(ends, end)(1) - getattr(weight, end)(1)).abs() < 1e-5 * step).all()
    assert ((weight - ends).abs().amax(1) < 0.50001 * step).all()
    zero = rtn(weight, None, bits=4, group_size=64, zero_point="integer").dense()
    assert (zero[:, 5] == 0).all() and (ends[:, 5] != 0).any()


@pytest.mark.parametrize("zero_point", ["float", "integer"])
def test_constant_and_zero_groups(zero_point):
    weight = torch.zeros(3, 16)
    weight[1], weight[2] = 0.7, -0.3
    dense = rtn(weight, None, bits=3, group_size=8, zero_point=zero_point).dense()
    torch.testing.assert_close(dense, weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("zero_point", ["float", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_is_the_best_of_all_shrunk_ranges(bits, zero_point):
    weight, power = weight_of(5, 32) ** 3, torch.rand(32, generator=torch.Generator().manual_seed(0))
    grid = {"bits": bits, "group_size": 16, "zero_point": zero_point}

    def errors(dense):  # of every group
        return ((weight - dense).square() * power).view(5, 2, 16).sum(-1)

    found = Grid(**grid, mse=True)
    least = torch.full((5, 2), torch.inf)
    for step in range(26):
        share = 1 - step / 40
        low, high = weight.view(5, 2, 16).amin(-1).clamp_max(0), weight.view(5, 2, 16).amax(-1).clamp_min(0)
        scales, offsets = Grid(**grid).span(low * share, high * share)
        least = torch.minimum(least, errors(Grid(**grid).round(weight, scales, offsets).dense()))
    torch.testing.assert_close(errors(found.round(weight, *found.fit(weight, power)).dense()), least)
    assert (least.sum() < 0.95 * errors(rtn(weight, None, **grid).dense()).sum()) or bits == 4


@pytest.mark.parametrize("mse", [False, True])
def test_a_shorter_last_group_is_a_group_of_its_own(mse):
    weight = weight_of(4, 40)
    dense = rtn(weight, None, bits=3, group_size=16, mse=mse).dense()
    parts = [rtn(part.contiguous(), None, bits=3, group_size=-1, mse=mse).dense() for part in weight.split(16, dim=1)]
    assert torch.equal(dense, torch.cat(parts, dim=1))


@pytest.mark.parametrize("name", GRIDS)
def test_grid_errors(name):
    weight, statistics = weight_of(4, 64), statistics_of(64)
    with pytest.raises(EoraLabError, match="bits must be between 2 and 8, not 9"):
        compress(name, weight, statistics, bits=9, group_size=16)
    with pytest.raises(EoraLabError, match=r"group size must be 1 or more, or -1 .* not 0"):
        compress(name, weight, statistics, bits=4, group_size=0)


def test_weights_too_large_for_float16_scales():
    with pytest.raises(EoraLabError, match="too large"):
        rtn(torch.full((2, 8), 1e7), None, bits=2, group_size=8, scale_dtype="float16")
