"""Certificates: every road to the optimum ends at the same loss, and no rival gets below it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eora_lab import EoraLabError, InputStatistics, LowRank, solve
from eora_lab.compensate import SOLVERS
from eora_lab.compensate.eora_paper import eora_paper

KINDS = ("random", "rank-deficient", "condition 1e12", "outlier channels")
SHAPES = [(24, 40), (40, 24), (32, 32), (1, 16), (16, 1)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(kind: str, features: int, seed: int = 0) -> Tensor:
    """float64 input covariances of the kinds that language models show, and worse."""
    x = normal(4 * features, features, seed=seed)
    if kind == "rank-deficient":
        x = x[: max(features // 3, 1)]
    if kind == "outlier channels":
        x[:, :: max(features // 4, 1)] *= 300
    if kind == "condition 1e12":
        Q = torch.linalg.qr(normal(features, features, seed=seed)).Q
        S = Q * torch.logspace(0, -12, features, dtype=torch.float64) @ Q.T
        return (S + S.T) / 2
    return x.T @ x / len(x)


def loss(R: Tensor, S: Tensor, answer: LowRank) -> float:
    """tr((R - B A) S (R - B A)ᵀ), measured in float64."""
    left = R.double() - answer.B.double() @ answer.A.double()
    return (left @ S.double() * left).sum().item()


def total(R: Tensor, S: Tensor) -> float:
    return (R.double() @ S.double() * R.double()).sum().item()


def by_symmetric_root(R: Tensor, S: Tensor, rank: int) -> LowRank:
    """QERA-exact: [R S^½]_r S^-½."""
    values, Q = torch.linalg.eigh(S)
    values = values.clamp_min(0)
    root = Q * values.sqrt() @ Q.T
    U, sigma, Vt = torch.linalg.svd(R @ root, full_matrices=False)
    inverse = torch.where(values > 1e-14 * values.max(), values.sqrt().reciprocal(), 0.0)
    return LowRank(sigma[:rank, None] * Vt[:rank] @ (Q * inverse @ Q.T), U[:, :rank], sigma.square())


def by_cholesky(R: Tensor, S: Tensor, rank: int) -> LowRank:
    """[R L]_r L^+ with S = L Lᵀ. L is the triangle of a QR of the root, which exists for a singular S too."""
    values, Q = torch.linalg.eigh(S)
    L = torch.linalg.qr((Q * values.clamp_min(0).sqrt()).T).R.T
    U, sigma, Vt = torch.linalg.svd(R @ L, full_matrices=False)
    return LowRank(sigma[:rank, None] * Vt[:rank] @ torch.linalg.pinv(L, rtol=1e-8), U[:, :rank], sigma.square())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_four_roads_to_one_optimum(kind, shape):
    R, S = normal(*shape, seed=1), second_moment(kind, shape[1])
    scale = total(R, S)
    for rank in {0, 1, min(shape) // 2, min(shape)}:
        answer = solve("eora", R, S, rank)
        best = loss(R, S, answer)
        assert answer.A.shape == (rank, shape[1]) and answer.B.shape == (shape[0], rank)
        assert abs(best - answer.spectrum[rank:].sum().item()) <= 1e-8 * scale  # predicted = measured
        paper = eora_paper(R, InputStatistics.from_second_moment(S), rank)
        for other in (paper, by_symmetric_root(R, S, rank), by_cholesky(R, S, rank)):
            assert abs(loss(R, S, other) - best) <= 1e-8 * scale
            torch.testing.assert_close(other.spectrum, answer.spectrum, rtol=0, atol=1e-8 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_qera_exact_is_eora(kind):
    R, S = normal(20, 30), second_moment(kind, 30)
    assert SOLVERS["qera_exact"] is SOLVERS["eora"]
    exact = by_symmetric_root(R, S, 6)
    assert abs(loss(R, S, exact) - loss(R, S, solve("qera_exact", R, S, 6))) <= 1e-12 * total(R, S)


@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from(KINDS),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(sorted(SOLVERS)),
)
def test_no_rival_is_below_the_optimum(out_features, in_features, kind, share, seed, method):
    R, S = normal(out_features, in_features, seed=seed), second_moment(kind, in_features, seed)
    rank = round(share * min(out_features, in_features))
    scale = total(R, S)
    best = loss(R, S, solve("eora", R, S, rank))
    assert loss(R, S, solve(method, R, S, rank)) >= best - 1e-9 * scale
    assert best <= scale * (1 + 1e-9)


@pytest.mark.parametrize("method", sorted(set(SOLVERS) - {"none"}))
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_full_rank_leaves_nothing_and_rank_zero_everything(method, shape):
    R, S = normal(*shape), second_moment("outlier channels", shape[1])
    assert loss(R, S, solve(method, R, S, min(shape))) <= 1e-9 * total(R, S)
    assert loss(R, S, solve(method, R, S, 0)) == pytest.approx(total(R, S))


@pytest.mark.parametrize("method", sorted(SOLVERS))
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_answers_are_nested_in_rank(method, shape):
    R, S = normal(*shape), second_moment("random", shape[1])
    high, low = solve(method, R, S, 12), solve(method, R, S, 5)
    torch.testing.assert_close(high.truncate(5).dense(), low.dense(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_float32_input_reaches_the_float64_optimum(kind, shape):
    R, S = normal(*shape).float(), second_moment(kind, shape[1]).float()
    best = loss(R, S, solve("eora", R.double(), S.double(), 16))
    answer = solve("eora", R, S, 16)
    assert answer.A.dtype == answer.B.dtype == torch.float32
    assert loss(R, S, answer) - best <= 1e-4 * best + 1e-7 * total(R, S)  # second term: float32 rounding of B A


@pytest.mark.parametrize("kind", KINDS)
def test_float32_svd_rivals_against_their_textbook_form(kind):
    R, S = normal(20, 30), second_moment(kind, 30)
    statistics = InputStatistics.from_second_moment(S)
    m, d = statistics.mean_abs, S.diagonal()
    scales = {
        "svd": torch.ones(30),
        "act_s": m.sqrt(),
        "act_s_released": m,
        "lqer": m / (m.min() * m.max()).sqrt(),
        "qera_approx": d.sqrt(),
    }
    for method, s in scales.items():
        U, sigma, Vt = torch.linalg.svd(R * s.double(), full_matrices=False)
        textbook = U[:, :7] * sigma[:7] @ Vt[:7] / s.double()
        torch.testing.assert_close(solve(method, R, statistics, 7).dense(), textbook, rtol=0, atol=1e-7)


def test_a_dead_channel_does_not_divide_by_zero():
    R, x = normal(12, 16), normal(100, 16)
    x[:, 3] = 0
    statistics = InputStatistics(16)
    statistics.update(x)
    for method in SOLVERS:
        answer = solve(method, R, statistics, 4)
        assert torch.isfinite(answer.A).all() and torch.isfinite(answer.B).all()


def test_zero_residual_and_zero_input():
    for R, S in ((torch.zeros(8, 12), torch.eye(12)), (torch.ones(8, 12), torch.zeros(12, 12))):
        for method in SOLVERS:
            answer = solve(method, R, S, 3)
            assert torch.isfinite(answer.dense()).all() and loss(R, S, answer) <= 1e-12


def test_null_space_policies_of_the_paper_form():
    R, S = normal(20, 30), second_moment("rank-deficient", 30)
    best = loss(R, S, solve("eora", R, S, 5))
    statistics = InputStatistics.from_second_moment(S)
    assert loss(R, S, eora_paper(R, statistics, 5, "drop")) == pytest.approx(best, rel=1e-8)
    assert loss(R, S, eora_paper(R, statistics, 5, "clamp")) == pytest.approx(best, rel=1e-6)


def test_balanced_factors_have_equal_norms_and_the_same_product():
    answer = solve("eora", normal(20, 30), second_moment("outlier channels", 30), 6)
    balanced = answer.balanced()
    torch.testing.assert_close(balanced.dense(), answer.dense())
    torch.testing.assert_close(balanced.A.norm(dim=1), balanced.B.norm(dim=0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda R, S: solve("eroa", R, S, 2), "unknown method 'eroa'; known: none, svd"),
        (lambda R, S: solve("eora", R, S, 9), r"rank 9 does not fit a layer of \(8, 12\): at most 8"),
        (lambda R, S: solve("eora", R, S, -1), "rank -1 does not fit"),
        (lambda R, S: solve("eora", R, S[:-1, :-1], 2), "12 inputs cannot use statistics of 11"),
        (lambda R, S: solve("eora", R, S[:-1], 2), r"square matrix, not \(11, 12\)"),
        (lambda R, S: solve("eora", R, S + torch.eye(12) * float("nan"), 2), "second moment has NaN or Inf"),
        (lambda R, S: solve("eora", R, S + torch.ones(12, 12).triu(1), 2), "not symmetric"),
        (lambda R, S: solve("eora", R * float("inf"), S, 2), "residual has NaN or Inf"),
    ],
)
def test_errors(call, message):
    with pytest.raises(EoraLabError, match=message):
        call(torch.ones(8, 12), torch.eye(12))
