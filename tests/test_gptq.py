"""GPTQ against a slow exact version, and where it must equal or beat others."""

import pytest
import torch

from eora_lab import InputStatistics
from eora_lab.compress import gptq, rtn
from eora_lab.compress.feedback import factor_of, inverse_factor, inverse_of
from eora_lab.compress.grid import Grid
from eora_lab.compress.grid_weight import zero_points
from tests.layers import output_error, statistics_of, weight_of


def reference_gptq(weight, second_moment, grid: Grid, damp: float, desc_act: bool):
    """GPTQ in float64 without blocks: after each column, solve afresh for the best update of the columns left.

    Frantar et al., equation 2: W_rest -= err / [H^-1]_qq * [H^-1]_q,rest with H over the columns that are left.
    """
    power = second_moment.diagonal()
    H = second_moment.double() + damp * power.double().mean() * torch.eye(len(second_moment))
    W = weight.double().clone()
    dense = torch.empty_like(W)
    left = power.argsort(descending=True).tolist() if desc_act else list(range(len(power)))
    group_size = len(power) if grid.group_size == -1 else grid.group_size
    grids = {}
    while left:
        q = left[0]
        first = q // group_size * group_size
        if first not in grids:
            group = slice(first, first + group_size)
            grids[first] = grid.fit((weight if desc_act else W.float())[:, group], power[group])
        scale, zero = grids[first][0][:, 0].double(), zero_points(*grids[first])[:, 0].double()
        code = (W[:, q] / scale + zero).round().clamp(0, 2**grid.bits - 1)
        dense[:, q] = (code - zero) * scale
        inverse = torch.linalg.inv(H[left][:, left])
        left = left[1:]
        W[:, left] -= ((W[:, q] - dense[:, q]) / inverse[0, 0])[:, None] * inverse[0, 1:]
    return dense


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("mse", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "zero_point"), [(3, 16, "float"), (4, 24, "integer"), (2, 40, "float"), (4, -1, "integer")]
)
def test_gptq_equals_the_slow_exact_version(bits, group_size, zero_point, mse, desc_act):
    """Groups of 40 leave 16 of the 96 columns to a shorter last one."""
    weight, statistics = weight_of(8, 96), statistics_of(96, tokens=1000)
    grid = {"bits": bits, "group_size": group_size, "zero_point": zero_point, "mse": mse}
    fast = gptq(weight, statistics, **grid, damp_percent=0.02, desc_act=desc_act).dense()
    slow = reference_gptq(weight, statistics.second_moment, Grid(**grid), 0.02, desc_act)
    # float32 against float64 may flip a tie, and a flip moves all later columns of its row
    same = (fast.double() - slow).abs().amax(1) < 1e-3
    assert same.sum() >= 7


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("desc_act", [True, False])
def test_gptq_beats_rtn_where_inputs_are_correlated(bits, desc_act):
    weight, statistics = weight_of(32, 128), statistics_of(128)
    kwargs = {"bits": bits, "group_size": 32}
    better = output_error(weight, gptq(weight, statistics, **kwargs, desc_act=desc_act), statistics)
    assert better < 0.8 * output_error(weight, rtn(weight, statistics, **kwargs), statistics)


def test_gptq_with_uncorrelated_inputs_is_rtn():
    statistics = InputStatistics.from_second_moment(torch.eye(64))
    for mse in (False, True):
        weight, grid = weight_of(8, 64), {"bits": 4, "group_size": 16, "zero_point": "integer", "mse": mse}
        assert torch.equal(gptq(weight, statistics, **grid).codes, rtn(weight, statistics, **grid).codes)


def test_gptq_with_few_tokens_a_dead_channel_constant_rows_and_a_zero_group():
    statistics = InputStatistics(64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 0
    statistics.update(x)
    weight = weight_of(8, 64)
    weight[1], weight[2], weight[:, 16:32] = 0.5, 0, 0
    compressed = gptq(weight, statistics, bits=4, group_size=16, mse=True)
    assert torch.isfinite(compressed.dense()).all() and compressed.dense()[2].abs().max() < 1e-6
    assert output_error(weight, compressed, statistics) < output_error(
        weight, rtn(weight, None, bits=4, group_size=16), statistics
    )


def test_layers_that_share_an_input_share_the_factor_of_its_inverse():
    S = statistics_of(96).second_moment
    order = S.diagonal().argsort(descending=True)
    first = inverse_factor(S, 0.01, order)
    assert inverse_factor(S, 0.01, order.clone()) is first
    assert torch.equal(first, factor_of(S[order][:, order], 0.01))
    assert torch.equal(inverse_factor(S, 0.02, order), factor_of(S[order][:, order], 0.02))
    assert torch.equal(inverse_factor(S, 0.02), factor_of(S, 0.02))
    back = order.flip(0)
    assert torch.equal(inverse_factor(S, 0.02, back), factor_of(S[back][:, back], 0.02))
    S.diagonal().add_(1)
    assert torch.equal(inverse_factor(S, 0.02), factor_of(S, 0.02))
    other = 2 * S
    assert torch.equal(inverse_factor(other, 0.02), factor_of(other, 0.02))


@pytest.mark.parametrize("channels", [1, 2, 127, 128, 129, 300, 513])
def test_a_triangle_is_inverted_as_exactly_as_by_substitution(channels):
    """Its condition number is about 1e8."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2 * channels, channels, dtype=torch.float64, generator=generator)
    x *= torch.logspace(0, -8, channels, dtype=torch.float64)
    V = torch.linalg.qr(x).R
    one = torch.eye(channels, dtype=torch.float64)
    found, substituted = inverse_of(V), torch.linalg.solve_triangular(V, one, upper=True)
    assert torch.equal(found, found.triu())

    def residual(inverse: torch.Tensor) -> float:
        """|V X - I| entry by entry, beside |V| |X|, the bound of a backward stable inverse."""
        return float(((inverse @ V - one).abs() / (inverse.abs() @ V.abs())).nan_to_num(0).max())

    assert residual(found) <= max(2 * residual(substituted), channels * 2**-52)


def test_damping_grows_until_a_second_moment_with_rounding_errors_factorises():
    statistics = statistics_of(64)
    S = statistics.second_moment
    statistics.second_moment = (
        S - 1.5 * torch.linalg.eigvalsh(S)[0] * torch.eye(64) - 0.03 * S.diagonal().mean() * (torch.ones(64, 64) / 64)
    )
    assert torch.linalg.eigvalsh(statistics.second_moment)[0] < 0
    weight, grid = weight_of(8, 64), {"bits": 4, "group_size": 16}
    assert output_error(weight, gptq(weight, statistics, **grid, damp_percent=1e-9), statistics_of(64)) < output_error(
        weight, rtn(weight, None, **grid), statistics_of(64)
    )
