"""Pruners against their definitions, written slowly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eora_lab import EoraLabError, InputStatistics
from eora_lab.compress import PRUNERS, GridWeight, SparseWeight, gptq, magnitude, rtn, sparsegpt, wanda
from eora_lab.compress.grid import Grid
from eora_lab.compress.grid_weight import zero_points
from eora_lab.compress.sparsity import Sparsity
from tests.layers import output_error, statistics_of, weight_of

PATTERNS = ["2:4", "4:8", "1:4", "0.5", "0.3"]


def lowest(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: scores[i])[:count])


@given(st.sampled_from(PATTERNS), st.booleans(), st.integers(0, 2**32 - 1))
def test_the_lowest_scores_go(pattern, by_row, seed):
    score = weight_of(3, 16, seed).abs()
    kept = Sparsity.parse(pattern).keep(score, by_row)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        sets = [(row, range(start, start + m), m - n) for row in range(3) for start in range(0, 16, m)]
    elif by_row:
        sets = [(row, range(16), round(16 * float(pattern))) for row in range(3)]
    else:
        assert lowest(score.flatten().tolist(), round(48 * float(pattern))) == set(
            (~kept).flatten().nonzero().flatten().tolist()
        )
        return
    for row, columns, pruned in sets:
        scores = [score[row, i].item() for i in columns]
        assert {columns[i] for i in lowest(scores, pruned)} == {i for i in columns if not kept[row, i]}


def test_equal_scores_keep_the_count():
    assert Sparsity.parse("2:4").keep(torch.zeros(2, 8)).sum() == 8
    assert Sparsity.parse("0.25").keep(torch.ones(2, 8)).sum() == 12


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "1", "0", "-0.5", "two", "2:", "2:4:8", "nan"])
def test_sparsity_that_means_nothing(text):
    with pytest.raises(EoraLabError, match="sparsity must be"):
        Sparsity.parse(text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_magnitude_and_wanda_by_their_definitions(pattern):
    weight, statistics = weight_of(6, 64), statistics_of(64)
    for pruner, score, by_row in (
        (magnitude, weight.abs(), False),
        (wanda, weight.abs() * statistics.second_moment.diagonal().sqrt(), True),
    ):
        mask = Sparsity.parse(pattern).keep(score, by_row)
        pruned = pruner(weight, statistics, bits=16, sparsity=pattern)
        assert torch.equal(pruned.dense(), torch.where(mask, weight.half().float(), 0))


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize("zero_point", ["float", "integer"])
def test_prune_then_quantise_rounds_the_kept_weights_on_a_grid_of_their_own(name, zero_point):
    weight, statistics = weight_of(6, 64), statistics_of(64)
    grid = {"bits": 4, "group_size": 16, "zero_point": zero_point}
    pruned = PRUNERS[name](weight, statistics, bits=16, sparsity="2:4")
    both = PRUNERS[name](weight, statistics, sparsity="2:4", **grid)
    exact = rtn(weight * pruned.mask, None, **grid).dense() * pruned.mask
    assert torch.equal(both.dense(), exact)


def reference_sparsegpt(weight, second_moment, pattern: str, damp: float, grid: Grid | None):
    """SparseGPT in float64 without blocks or factors: every score and update from an inverse of the columns left."""
    n, m = map(int, pattern.split(":"))
    H = second_moment.double() + damp * second_moment.double().diagonal().mean() * torch.eye(len(second_moment))
    W, features = weight.double().clone(), len(H)
    mask = torch.zeros_like(W, dtype=torch.bool)
    inverses = [torch.linalg.inv(H[i:, i:]) for i in range(features)]
    cost = torch.stack([1 / inverse[0, 0] for inverse in inverses])

    def keep(start: int, stop: int):
        score = W[:, start:stop] ** 2 * cost[start:stop]
        kept = torch.zeros_like(score, dtype=torch.bool)
        for row in range(len(W)):
            for four in range(0, stop - start, m):
                for i in sorted(range(four, four + m), key=lambda i, row=row: score[row, i])[m - n :]:
                    kept[row, i] = True
        return kept

    for i in range(features):
        if i % m == 0:
            mask[:, i : i + m] = keep(i, i + m)
        if grid and i % grid.group_size == 0:
            group = slice(i, min(i + grid.group_size, features))
            fitted = grid.fit(W[:, group].float(), second_moment.diagonal()[group], keep(group.start, group.stop))
            scale, zero = fitted[0][:, 0].double(), zero_points(*fitted)[:, 0].double()
        compressed = W[:, i] * mask[:, i]
        if grid:
            compressed = ((compressed / scale + zero).round().clamp(0, 2**grid.bits - 1) - zero) * scale * mask[:, i]
        error = (W[:, i] - compressed) / inverses[i][0, 0]
        W[:, i] = compressed
        W[:, i + 1 :] -= error[:, None] * inverses[i][0, 1:]
    return W


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("grid", [None, Grid(4, 16), Grid(3, 48, zero_point="integer", mse=True), Grid(4, 80)], ids=str)
def test_sparsegpt_equals_the_slow_exact_version(pattern, grid):
    """Groups of 80 leave 16 of the 96 columns to a shorter last one."""
    weight, statistics = weight_of(8, 96), statistics_of(96, tokens=1000)
    slow = reference_sparsegpt(weight, statistics.second_moment, pattern, 0.02, grid)
    settings = vars(grid) if grid else {"bits": 16}
    fast = sparsegpt(weight, statistics, sparsity=pattern, damp_percent=0.02, **settings)
    assert torch.equal((fast.dense() != 0) & fast.mask, fast.dense() != 0)
    same = (fast.dense().double() - slow).abs().amax(1) < 3e-3  # float16 values; a tie may flip in a row
    assert same.sum() >= 7


@pytest.mark.parametrize("pattern", ["0.5", "0.3"])
@pytest.mark.parametrize("bits", [16, 4])
def test_unstructured_sparsegpt_prunes_the_share_in_every_span(pattern, bits):
    weight, statistics = weight_of(16, 192), statistics_of(192)
    pruned = sparsegpt(weight, statistics, sparsity=pattern, bits=bits, group_size=64)
    for span in (slice(0, 128), slice(128, 192)):
        part = pruned.mask[:, span]
        assert (~part).sum() == round(part.numel() * float(pattern))
    assert len(set(pruned.mask.sum(1).tolist())) > 1


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("bits", [16, 4])
def test_sparsegpt_beats_wanda_beats_magnitude(pattern, bits):
    statistics = statistics_of(128)
    scale = torch.logspace(-1, 1, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    statistics.second_moment = statistics.second_moment * scale * scale[:, None]
    weight = weight_of(32, 128)
    errors = [
        output_error(weight, pruner(weight, statistics, sparsity=pattern, bits=bits, group_size=32), statistics)
        for pruner in (sparsegpt, wanda, magnitude)
    ]
    assert errors[0] < 0.95 * errors[1] and errors[1] < errors[2]


def test_with_uncorrelated_inputs_all_pruners_are_one():
    statistics, weight = InputStatistics.from_second_moment(torch.eye(64)), weight_of(8, 64)
    for bits in (16, 4):
        results = [p(weight, statistics, sparsity="2:4", bits=bits, group_size=16).dense() for p in PRUNERS.values()]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_joint_compression_beats_pruning_and_then_rounding():
    weight, statistics = weight_of(32, 128), statistics_of(128)
    grid = {"bits": 3, "group_size": 32, "mse": True}
    pruned = sparsegpt(weight, statistics, sparsity="2:4", bits=16)
    rounded = Grid(**grid).round(pruned.dense(), *Grid(**grid).fit(pruned.dense(), None, pruned.mask), mask=pruned.mask)
    joint = sparsegpt(weight, statistics, sparsity="2:4", **grid)
    assert isinstance(joint, GridWeight) and isinstance(pruned, SparseWeight)
    assert output_error(weight, joint, statistics) < output_error(weight, rounded, statistics)
    assert output_error(weight, pruned, statistics) < output_error(weight, joint, statistics)
    assert output_error(weight, gptq(weight, statistics, **grid), statistics) < output_error(weight, joint, statistics)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("bits", [16, 3])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_dead_channels_constant_rows_and_zero_groups(name, bits, pattern):
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    x[:, 8:24] = 0
    statistics = InputStatistics(64)
    statistics.update(x)
    weight = weight_of(8, 64)
    weight[1], weight[2], weight[:, 32:48] = 0.5, 0, 0
    grid = {"bits": bits, "group_size": 16, "zero_point": "integer"}
    dense = PRUNERS[name](weight, statistics, sparsity=pattern, **grid).dense()
    assert torch.isfinite(dense).all() and (dense[2] == 0).all()
    if name == "sparsegpt":
        assert (dense[:, 8:24] == 0).all()
    if name == "magnitude" and bits == 16:
        assert set(dense[1].tolist()) == {0.0, 0.5}


@pytest.mark.parametrize("name", PRUNERS)
def test_pruner_errors(name):
    statistics = statistics_of(66)
    with pytest.raises(EoraLabError, match="sparsity 2:4 does not fit 66 input features"):
        PRUNERS[name](weight_of(4, 66), statistics, sparsity="2:4", bits=16)
    with pytest.raises(EoraLabError, match="too large for float16"):
        PRUNERS[name](1e9 * weight_of(4, 66), statistics, sparsity="0.5", bits=16)
