import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eora_lab import EoraLabError, InputStatistics
from eora_lab.compress import COMPRESSORS, CompressedWeight, gptq, rtn
from eora_lab.compress.weight import zero_points


def statistics_of(features: int, tokens: int = 400, seed: int = 0) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator)
    statistics = InputStatistics(features)
    statistics.update(torch.randn(tokens, features, generator=generator) @ mix)
    return statistics


def weight_of(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def output_error(weight: torch.Tensor, compressed: CompressedWeight, statistics: InputStatistics) -> float:
    R = (weight - compressed.dense()).double()
    return (R @ statistics.second_moment.double() * R).sum().item()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("zero_point", ["float", "integer"])
def test_state_dict_round_trip(name, bits, zero_point, scale_dtype):
    grid = {"bits": bits, "group_size": 16, "zero_point": zero_point, "scale_dtype": scale_dtype}
    compressed = COMPRESSORS[name](weight_of(12, 64), statistics_of(64), **grid)
    loaded = CompressedWeight.from_state_dict(compressed.state_dict())
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


def reference_gptq(weight, second_moment, grid: CompressedWeight, damp):
    """GPTQ in float64 without blocks: after each column, solve afresh for the best update of the columns left.

    Frantar et al., equation 2: W_rest -= err / [H^-1]_qq * [H^-1]_q,rest with H over the columns that are left.
    """
    H = second_moment.double() + damp * second_moment.double().diagonal().mean() * torch.eye(len(second_moment))
    W = weight.double().clone()
    dense = torch.empty_like(W)
    left = second_moment.diagonal().argsort(descending=True).tolist()
    zeros = zero_points(grid.scales, grid.offsets).double()
    group_size = W.shape[1] // grid.scales.shape[1]
    while left:
        q = left[0]
        scale, zero = grid.scales[:, q // group_size].double(), zeros[:, q // group_size]
        code = (W[:, q] / scale + zero).round().clamp(0, 2**grid.bits - 1)
        dense[:, q] = (code - zero) * scale
        inverse = torch.linalg.inv(H[left][:, left])
        left = left[1:]
        W[:, left] -= ((W[:, q] - dense[:, q]) / inverse[0, 0])[:, None] * inverse[0, 1:]
    return dense


@pytest.mark.parametrize("zero_point", ["float", "integer"])
@pytest.mark.parametrize(("bits", "group_size"), [(3, 16), (4, 24), (2, 64), (4, -1)])
def test_gptq_equals_the_slow_exact_version(bits, group_size, zero_point):
    weight, statistics = weight_of(8, 192), statistics_of(192, tokens=1000)
    grid = {"bits": bits, "group_size": group_size, "zero_point": zero_point}
    fast = gptq(weight, statistics, **grid, damp_percent=0.02).dense()
    slow = reference_gptq(weight, statistics.second_moment, rtn(weight, None, **grid), 0.02)
    # float32 against float64 may flip a tie, and a flip moves all later columns of its row
    same = (fast.double() - slow).abs().amax(1) < 1e-3
    assert same.sum() >= 7


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rtn_where_inputs_are_correlated(bits):
    weight, statistics = weight_of(32, 128), statistics_of(128)
    kwargs = {"bits": bits, "group_size": 32}
    better = output_error(weight, gptq(weight, statistics, **kwargs), statistics)
    assert better < 0.8 * output_error(weight, rtn(weight, statistics, **kwargs), statistics)


def test_gptq_with_uncorrelated_inputs_is_rtn():
    statistics = InputStatistics.from_second_moment(torch.eye(64))
    weight, grid = weight_of(8, 64), {"bits": 4, "group_size": 16, "zero_point": "integer"}
    assert torch.equal(gptq(weight, statistics, **grid).codes, rtn(weight, statistics, **grid).codes)


def test_gptq_with_fewer_tokens_than_channels_and_a_dead_channel():
    statistics = InputStatistics(64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 0
    statistics.update(x)
    weight = weight_of(8, 64)
    compressed = gptq(weight, statistics, bits=4, group_size=16)
    assert torch.isfinite(compressed.dense()).all()
    assert output_error(weight, compressed, statistics) < output_error(
        weight, rtn(weight, None, bits=4, group_size=16), statistics
    )


@pytest.mark.parametrize("name", COMPRESSORS)
def test_grid_errors(name):
    weight, statistics = weight_of(4, 64), statistics_of(64)
    with pytest.raises(EoraLabError, match="bits must be between 2 and 8, not 9"):
        COMPRESSORS[name](weight, statistics, bits=9, group_size=16)
    with pytest.raises(EoraLabError, match=r"group size 48 does not divide 64 .* use one of \[32, 64\] or -1"):
        COMPRESSORS[name](weight, statistics, bits=4, group_size=48)


def test_weights_too_large_for_float16_scales():
    with pytest.raises(EoraLabError, match="too large"):
        rtn(torch.full((2, 8), 1e7), None, bits=2, group_size=8, scale_dtype="float16")
