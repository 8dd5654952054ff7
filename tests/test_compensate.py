"""Certificates: every road to the optimum ends at the same loss, and no rival gets below it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eora_lab import EoraLabError, InputStatistics, LowRank, OutputStatistics, solve
from eora_lab.calibrate.output_statistics import DAMPING
from eora_lab.compensate import SOLVERS, krylov
from eora_lab.compensate.eora_paper import eora_paper
from eora_lab.compensate.factors import StoredFactors, store_factors
from eora_lab.compensate.projection import in_double
from eora_lab.compensate.shrinkage import solve_shrunk

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
    F = second_moment(kind, out_features, seed + 1)
    assert loss(R, S, solve(method, R, S, rank, F)) >= best - 1e-9 * scale
    assert best <= scale * (1 + 1e-9)


@pytest.mark.parametrize("method", sorted(set(SOLVERS) - {"none"}))
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_full_rank_leaves_nothing_and_rank_zero_everything(method, shape):
    R, S, F = normal(*shape), second_moment("outlier channels", shape[1]), second_moment("outlier channels", shape[0])
    assert loss(R, S, solve(method, R, S, min(shape), F)) <= 1e-9 * total(R, S)
    assert loss(R, S, solve(method, R, S, 0, F)) == pytest.approx(total(R, S))


@pytest.mark.parametrize("method", sorted(SOLVERS))
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_answers_are_nested_in_rank(method, shape):
    R, S, F = normal(*shape), second_moment("random", shape[1]), second_moment("random", shape[0])
    high, low = solve(method, R, S, 12, F), solve(method, R, S, 5, F)
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
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_float32_svd_rivals_against_their_textbook_form(kind, shape):
    R, S = normal(*shape), second_moment(kind, shape[1])
    statistics = InputStatistics.from_second_moment(S)
    m, d = statistics.mean_abs, S.diagonal()
    scales = {
        "svd": torch.ones(shape[1]),
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
        answer = solve(method, R, statistics, 4, second_moment("rank-deficient", 12))
        assert torch.isfinite(answer.A).all() and torch.isfinite(answer.B).all()


def test_zero_residual_and_zero_input():
    for R, S in ((torch.zeros(8, 12), torch.eye(12)), (torch.ones(8, 12), torch.zeros(12, 12))):
        for method in SOLVERS:
            answer = solve(method, R, S, 3, torch.eye(8))
            assert torch.isfinite(answer.dense()).all() and loss(R, S, answer) <= 1e-12


def test_null_space_policies_of_the_paper_form():
    R, S = normal(20, 30), second_moment("rank-deficient", 30)
    best = loss(R, S, solve("eora", R, S, 5))
    statistics = InputStatistics.from_second_moment(S)
    assert loss(R, S, eora_paper(R, statistics, 5, "drop")) == pytest.approx(best, rel=1e-8)
    assert loss(R, S, eora_paper(R, statistics, 5, "clamp")) == pytest.approx(best, rel=1e-6)


def weighted_loss(R: Tensor, S: Tensor, F: Tensor, answer: LowRank) -> float:
    """tr(F (R - B A) S (R - B A)ᵀ), measured in float64."""
    left = R.double() - answer.B.double() @ answer.A.double()
    return (F.double() @ left @ S.double() * left).sum().item()


def damped(F: Tensor, damping: float = DAMPING) -> Tensor:
    return F.double() + damping * F.double().diagonal().mean() * torch.eye(len(F), dtype=torch.float64)


def by_symmetric_roots(R: Tensor, S: Tensor, F: Tensor, rank: int) -> LowRank:
    """F^-½ [F^½ R S^½]_r S^-½, by two symmetric roots and one SVD."""
    values, Q = torch.linalg.eigh(F)
    answer = by_symmetric_root(Q * values.sqrt() @ Q.T @ R, S, rank)
    return LowRank(answer.A, Q / values.sqrt() @ Q.T @ answer.B, answer.spectrum)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_the_two_sided_answer_is_the_optimum_of_its_metric(kind, other, shape):
    R, S, F = normal(*shape, seed=1), second_moment(kind, shape[1]), second_moment(other, shape[0], seed=2)
    metric = damped(F)
    scale = weighted_loss(R, S, metric, solve("none", R, S, 0))
    for rank in {0, 1, min(shape) // 2, min(shape)}:
        answer = solve("eora_fisher", R, S, rank, F)
        best = weighted_loss(R, S, metric, answer)
        assert answer.A.shape == (rank, shape[1]) and answer.B.shape == (shape[0], rank)
        assert abs(best - answer.spectrum[rank:].sum().item()) <= 1e-8 * scale  # predicted = measured
        exact = by_symmetric_roots(R, S, metric, rank)
        assert abs(weighted_loss(R, S, metric, exact) - best) <= 1e-8 * scale
        torch.testing.assert_close(answer.spectrum, exact.spectrum, rtol=0, atol=1e-8 * scale)
        for rival in ("eora", "svd", "qera_approx"):
            assert weighted_loss(R, S, metric, solve(rival, R, S, rank)) >= best - 1e-9 * scale


@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from(KINDS), st.floats(0.01, 100), st.integers(0, 2**16))
def test_where_all_outputs_matter_alike_it_is_eora(out_features, in_features, kind, size, seed):
    R, S = normal(out_features, in_features, seed=seed), second_moment(kind, in_features, seed)
    rank = min(R.shape) // 2
    outputs = OutputStatistics.from_second_moment(size * torch.eye(out_features, dtype=torch.float64))
    answer, plain = solve("eora_fisher", R, S, rank, outputs), solve("eora", R, S, rank)
    assert abs(loss(R, S, answer) - loss(R, S, plain)) <= 1e-9 * total(R, S)
    torch.testing.assert_close(answer.spectrum, size * (1 + DAMPING) * plain.spectrum, rtol=1e-8, atol=1e-8 * size)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_two_sided_in_float32_reaches_the_float64_optimum(shape):
    R, S, F = normal(*shape), second_moment("outlier channels", shape[1]), second_moment("condition 1e12", shape[0])
    best = weighted_loss(R, S, damped(F), solve("eora_fisher", R, S, 16, F))
    answer = solve("eora_fisher", R.float(), S.float(), 16, F.float())
    assert answer.A.dtype == answer.B.dtype == torch.float32
    whole = weighted_loss(R, S, damped(F), solve("none", R, S, 0))
    assert weighted_loss(R, S, damped(F), answer) - best <= 1e-4 * best + 1e-7 * whole


def test_a_large_layer_goes_through_the_krylov_space_in_the_two_sided_metric():
    R, S = power_law(1100, 1200)
    F = second_moment("random", 1100).float()
    answer = solve("eora_fisher", R, S, 24, F)
    LR = torch.linalg.cholesky(damped(F)).T @ R.double()
    exact = torch.linalg.eigvalsh(LR @ S.double() @ LR.T).flip(0)
    assert len(answer.spectrum) == 24  # it ends at the rank there
    left = weighted_loss(R, S, damped(F), answer)
    assert left == pytest.approx(exact[24:].sum().item(), rel=1e-4)


def test_outputs_that_no_gradient_reaches_are_compensated_as_by_eora_and_are_worth_nothing():
    R, S = normal(20, 30), second_moment("random", 30)
    answer = solve("eora_fisher", R, S, 6, torch.zeros(20, 20))
    torch.testing.assert_close(answer.dense(), solve("eora", R, S, 6).dense())
    assert not answer.spectrum.any()


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
        (lambda R, S: solve("eora_fisher", R, S, 2), "eora_fisher needs the gradients at the layer's output: measure"),
        (lambda R, S: solve("eora_fisher", R, S, 2, S), "a layer of 8 outputs cannot use statistics of 12"),
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


def power_law(out_features: int, in_features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A residual and a singular covariance with a power-law spectrum and outlier channels, float32."""
    x = normal(in_features // 2, in_features, seed=seed) * torch.arange(1, in_features + 1).rsqrt()
    x = x @ normal(in_features, in_features, seed=seed + 1) / in_features**0.5
    x[:, ::97] *= 20
    return normal(out_features, in_features, seed=seed + 2).float(), (x.T @ x / len(x)).float()


@pytest.mark.parametrize("shape", [(1024, 1100), (1400, 1024)])
@pytest.mark.parametrize("method", ["eora", "qera_approx"])
def test_krylov_space_reaches_the_exact_optimum(shape, method):
    R, S = power_law(*shape)
    answer = solve(method, R, S, 24)
    assert len(answer.spectrum) == 24, "the exact path was taken"
    metric = S.double() if method == "eora" else torch.diag(S.diagonal().double())
    values = torch.linalg.eigvalsh(R.double() @ metric @ R.double().T).flip(0)
    best = values[24:].sum().item()
    assert loss(R, metric, answer) == pytest.approx(best, rel=1e-4)
    torch.testing.assert_close(answer.spectrum, values[:24], rtol=1e-3, atol=0)
    torch.testing.assert_close(answer.B.T @ answer.B, torch.eye(24), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [90, 110, 130, 500])
def test_ranks_near_the_limit_of_the_krylov_path(rank):
    """A space that fills the layer is no space to search in: whichever path answers, the loss is the optimum."""
    R, S = power_law(1024, 1024)
    values = torch.linalg.eigvalsh(R.double() @ S.double() @ R.double().T).flip(0)
    assert loss(R, S, solve("eora", R, S, rank)) == pytest.approx(values[rank:].sum().item(), rel=1e-4)


def test_a_product_with_s_some_columns_at_a_time_is_the_product():
    random = torch.Generator().manual_seed(0)
    R = torch.randn(5, 2500, generator=random, dtype=torch.float64)
    S = torch.randn(2500, 2500, generator=random)
    torch.testing.assert_close(in_double(R, S), R @ S.double(), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("size", [10.0, 100.0])
def test_massive_activations_do_not_drown_the_rest(size):
    """Few inputs larger than all others, as trained models have them, leave float32 no digits for the rest."""
    R, S = power_law(1024, 1100)
    spikes = size * normal(3, 1100, seed=7)
    S = S + (spikes.T @ spikes).float()
    answer = solve("eora", R, S, 24)
    assert len(answer.spectrum) == 24, "the exact path was taken"
    values = torch.linalg.eigvalsh(R.double() @ S.double() @ R.double().T).flip(0)
    assert values[0] > size**2 * values[24]
    assert loss(R, S, answer) == pytest.approx(values[24:].sum().item(), rel=1e-4)


def test_krylov_gives_up_where_its_bound_is_not_met():
    """An identity times noise has no leading directions: the exact path answers, and as well as it can be done."""
    R = normal(1024, 1024)
    flat = torch.linalg.qr(R).Q.float()  # every eigenvalue of R Rᵀ is 1
    assert (
        krylov.top_eigenvectors(flat + 1e-3 * torch.diag(torch.arange(1024) % 7).float(), torch.ones(1024), 24) is None
    )
    answer = solve("svd", flat, torch.eye(1024), 24)
    assert loss(flat, torch.eye(1024), answer) == pytest.approx(1000, rel=1e-4)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_factors_in_few_bits(bits):
    R, S = power_law(128, 192)
    answer = solve("eora", R, S, 64)
    best, scale = loss(R, S, answer), total(R, S)

    def lost(factors: StoredFactors) -> float:
        A, B = factors.dense()
        return (loss(R, S, LowRank(A, B, answer.spectrum)) - best) / scale

    plain = store_factors(answer, bits)
    fitted = store_factors(answer, bits, (R, InputStatistics.from_second_moment(S)))
    assert 0 < lost(fitted) < 0.2 * lost(plain)
    assert lost(fitted) < {8: 1e-5, 4: 0.002, 3: 0.01}[bits]
    # codes, and a row's float16 scale and its zero point, in whole bytes
    assert plain.nbytes == fitted.nbytes == (64 * 192 + 128 * 64) * bits // 8 + (64 + 128) * 3
    again = StoredFactors.from_state_dict(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.dense(), plain.dense(), strict=True))


def test_few_bit_factors_of_an_error_that_avoids_the_loud_directions():
    """As GPTQ's: what the factors do to the inputs is a small difference of large numbers."""
    R, S = power_law(96, 128)
    loud = torch.linalg.qr(normal(128, 2, seed=3)).Q.float()
    R, S = R - R @ loud @ loud.T, S + 1e6 * loud @ loud.T
    answer, statistics = solve("eora", R, S, 32), InputStatistics.from_second_moment(S)
    lost = []
    for fit in (None, (R, statistics)):
        A, B = store_factors(answer, 4, fit).dense()
        lost.append(loss(R, S, LowRank(A, B, answer.spectrum)))
    assert lost[1] < 1e-2 * lost[0]


@pytest.mark.parametrize("fitted", [False, True])
def test_few_bit_factors_of_an_error_of_low_rank(fitted):
    """Components that remove nothing have zeros to round, and do no harm."""
    R, S = (normal(48, 3) @ normal(3, 60, seed=1)).float(), second_moment("random", 60).float()
    for answer in (solve("eora", R, S, 8), solve("eora", 0 * R, S, 8), solve("none", R, S, 8)):
        fit = (R if answer.A.any() else 0 * R, InputStatistics.from_second_moment(S)) if fitted else None
        A, B = store_factors(answer, 4, fit).dense()
        stored = LowRank(A, B, answer.spectrum)
        residual = R if answer.A.any() or not answer.rank else 0 * R
        assert loss(residual, S, stored) - loss(residual, S, answer) <= 0.03 * total(R, S)


def test_sixteen_bit_factors_lose_next_to_nothing():
    R, S = normal(40, 60).float(), second_moment("random", 60).float()
    answer = solve("eora", R, S, 20)
    A, B = store_factors(answer).dense()
    assert loss(R, S, LowRank(A, B, answer.spectrum)) == pytest.approx(loss(R, S, answer), rel=1e-4)
    with pytest.raises(EoraLabError, match="factor bits must be 16, or between 2 and 8, not 1"):
        store_factors(answer, 1)


def test_shrinkage_helps_on_new_tokens_when_there_are_few():
    mix, R = normal(64, 64) * torch.logspace(0, -1.5, 64), normal(48, 64).float()

    def statistics(tokens: int, seed: int) -> InputStatistics:
        made = InputStatistics(64)
        made.update((normal(tokens, 64, seed=seed) @ mix).float())
        return made

    few, truth = statistics(24, 1), statistics(20_000, 3).second_moment
    few.held_out = statistics(24, 2)
    answer, amount = solve_shrunk("eora", R, few, 12)
    assert amount > 0
    assert loss(R, truth, answer) < loss(R, truth, solve("eora", R, few, 12))
    many = statistics(20_000, 4)
    many.held_out = statistics(20_000, 5)
    harmless, plain = (loss(R, truth, a) for a in (solve_shrunk("eora", R, many, 12)[0], solve("eora", R, many, 12)))
    assert harmless < 1.001 * plain
    with pytest.raises(EoraLabError, match="hold out a share"):
        solve_shrunk("eora", R, statistics(24, 1), 12)
