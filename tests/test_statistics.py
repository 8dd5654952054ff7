from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eora_lab import EoraLabError, InputStatistics, OutputStatistics
from eora_lab.calibrate.statistics import energies_with_path, output_energy


def tokens(n: int, features: int, seed: int = 0) -> torch.Tensor:
    """Correlated channels with outliers, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return x * torch.logspace(0, 2, features)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 20))
def test_every_token_weighs_the_same_however_batched(sizes, features):
    x = tokens(sum(sizes), features)
    statistics = InputStatistics(features)
    for part in x.split(sizes):
        statistics.update(part)
    assert statistics.tokens == sum(sizes)
    if sizes and sum(sizes):
        exact = (x.double().T @ x.double()) / len(x)
        torch.testing.assert_close(
            statistics.second_moment.double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item()
        )
        torch.testing.assert_close(statistics.mean_abs, x.abs().mean(0), rtol=1e-5, atol=1e-6)


def test_float32_accumulation_over_many_batches_stays_close_to_float64():
    x = tokens(65_536, 24)
    statistics = InputStatistics(24)
    for part in x.split(64):  # 1024 updates
        statistics.update(part)
    exact = (x.double().T @ x.double()) / len(x)
    # each update rounds by up to 6e-8 twice; 1024 roundings of random sign add up to about 32 of them
    scale = (exact.diagonal()[:, None] * exact.diagonal()[None]).sqrt()
    assert ((statistics.second_moment.double() - exact).abs() / scale).max() < 2 * 32 * 6e-8


def test_merge_equals_one_stream():
    x = tokens(300, 16)
    whole, left, right = InputStatistics(16), InputStatistics(16), InputStatistics(16)
    whole.update(x)
    left.update(x[:70])
    right.update(x[70:])
    merged = left.merge(right)
    assert merged.tokens == 300
    torch.testing.assert_close(merged.second_moment, whole.second_moment, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(merged.mean_abs, whole.mean_abs, rtol=1e-5, atol=1e-6)


@given(st.permutations(range(6)), st.integers(0, 6), st.sampled_from([7, 40, 300]))
def test_batches_give_the_same_bits_in_any_order_and_shared_out(order, share, features):
    """As processes do that measure some each."""
    batches = tokens(96, features).split(16)
    whole, left, right = InputStatistics(features), InputStatistics(features), InputStatistics(features)
    for batch in batches:
        whole.update(batch)
    for place, number in enumerate(order):
        (left if place < share else right).update(batches[number])
    merged = left.merge(right)
    assert merged.tokens == whole.tokens == 96
    assert torch.equal(merged.second_moment, whole.second_moment) and torch.equal(merged.mean_abs, whole.mean_abs)


def test_batch_and_sequence_axes_are_tokens():
    statistics = InputStatistics(8)
    statistics.update(torch.ones(2, 3, 8))
    assert statistics.tokens == 6
    torch.testing.assert_close(statistics.second_moment, torch.ones(8, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_names_the_layer(bad):
    statistics = InputStatistics(4, name="model.layers.3.mlp.down_proj")
    with pytest.raises(EoraLabError, match=r"model\.layers\.3\.mlp\.down_proj: NaN or Inf"):
        statistics.update(torch.tensor([[1.0, bad, 0.0, 2.0]]))


def test_save_and_load(tmp_path):
    statistics = InputStatistics(8, name="a.b")
    statistics.update(tokens(50, 8))
    statistics.save(tmp_path / "s.safetensors")
    loaded = InputStatistics.load(tmp_path / "s.safetensors")
    assert (loaded.name, loaded.tokens) == ("a.b", 50)
    assert torch.equal(loaded.second_moment, statistics.second_moment)
    assert torch.equal(loaded.mean_abs, statistics.mean_abs)


def test_load_refuses_other_files(tmp_path):
    (tmp_path / "x").write_bytes(b"no statistics")
    for name in ("x", "absent"):
        with pytest.raises(EoraLabError, match="not a statistics file"):
            InputStatistics.load(tmp_path / name)


def test_root_of_a_singular_second_moment():
    statistics = InputStatistics(16)
    statistics.update(tokens(5, 16))  # rank 5
    root = statistics.root()
    S = statistics.second_moment.double()
    torch.testing.assert_close(root @ root.T, S, rtol=0, atol=1e-6 * S.abs().max().item())
    statistics.update(tokens(5, 16, seed=1))  # the kept root must not outlive its S
    S = statistics.second_moment.double()
    torch.testing.assert_close(statistics.root() @ statistics.root().T, S, rtol=0, atol=1e-6 * S.abs().max().item())


def test_statistics_of_outputs_are_saved_merged_and_told_from_those_of_inputs(tmp_path):
    g = tokens(300, 12)
    whole, left, right = (OutputStatistics(12, name="a.b") for _ in range(3))
    whole.update(g)
    left.update(g[:70])
    right.update(g[70:])
    right.held_out = left
    merged = left.merge(right)
    assert merged.tokens == 300 and merged.held_out is left
    torch.testing.assert_close(merged.second_moment, whole.second_moment, rtol=1e-5, atol=1e-3)
    merged.save(tmp_path / "F.safetensors")
    loaded = OutputStatistics.load(tmp_path / "F.safetensors")
    assert (loaded.name, loaded.tokens, loaded.held_out.tokens) == ("a.b", 300, 70)
    assert torch.equal(loaded.second_moment, merged.second_moment)
    assert torch.equal(loaded.held_out.second_moment, left.second_moment)
    with pytest.raises(EoraLabError, match="holds statistics of a layer's output gradient, not of its input"):
        InputStatistics.load(tmp_path / "F.safetensors")
    InputStatistics(12).save(tmp_path / "S.safetensors")
    with pytest.raises(EoraLabError, match="holds statistics of a layer's input, not of its output gradient"):
        OutputStatistics.load(tmp_path / "S.safetensors")
    with pytest.raises(EoraLabError, match=r"a\.b: NaN or Inf in its output gradient after 300 tokens"):
        loaded.update(torch.full((1, 12), torch.inf))


def test_a_root_of_a_noisy_second_moment_needs_some_damping():
    statistics = OutputStatistics(40)
    statistics.update(tokens(3, 40))
    L, F = statistics.root(), statistics.second_moment.double()
    wanted = F + 0.1 * F.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(L @ L.T, wanted, rtol=0, atol=1e-6 * F.abs().max().item())
    with pytest.raises(EoraLabError, match=r"a damping of 0\.0 is too small for its F"):
        OutputStatistics.from_second_moment(torch.ones(4, 4), damping=0.0).root()


def test_the_cost_of_an_error_is_the_mean_of_its_squared_effect():
    """x and g are drawn apart, so that tr(F D S Dᵀ) = E[(gᵀ D x)²]."""
    x, g, D = tokens(50, 8), tokens(60, 5, seed=1), torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    inputs, outputs = InputStatistics(8), OutputStatistics(5)
    inputs.update(x)
    outputs.update(g)
    assert outputs.cost(D, inputs.metric) == pytest.approx((g @ D @ x.T).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("features", [255, 256, 257, 600])
def test_wide_second_moments_are_added_up_panel_by_panel(features):
    x = tokens(70, features)
    statistics = OutputStatistics(features)
    for part in x.split(40):
        statistics.update(part)
    found, exact = statistics.second_moment, x.double().T @ x.double() / len(x)
    assert torch.equal(found[:256, 256:], found[256:, :256].T)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item())


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_energies_with_a_path_are_those_of_both_matrices(diagonal):
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    x = draw(200, 24) * torch.logspace(-2, 2, 24)
    S = x.T @ x / len(x)
    R, A, B = draw(16, 24), draw(3, 24), draw(16, 3)
    metric = S.diagonal() if diagonal else S
    before, after = energies_with_path(R, A, B, metric)
    wanted = [output_energy(matrix.double(), metric.double()) for matrix in (R, R.double() - B.double() @ A.double())]
    assert [before, after] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("features", [511, 512, 513, 1300])
def test_energies_of_wide_layers_are_those_of_all_of_the_second_moment(features):
    x = tokens(90, features)
    S, generator = x.T @ x / len(x), torch.Generator().manual_seed(1)
    R, B = (torch.randn(7, n, generator=generator) for n in (features, 2))
    A = B.T @ R / 10
    left = R.double() - B.double() @ A.double()
    wanted = [(matrix @ S.double() * matrix).sum().item() for matrix in (R.double(), left)]
    assert output_energy(R, S) == pytest.approx(wanted[0], rel=1e-5)
    assert energies_with_path(R, A, B, S) == pytest.approx(wanted, rel=1e-5)


def test_what_a_path_leaves_is_told_exactly_where_it_is_next_to_nothing():
    """The difference of two large numbers would be of rounding alone."""
    x, generator = tokens(90, 600), torch.Generator().manual_seed(2)
    S = x.T @ x / len(x)
    A, B = torch.randn(4, 600, generator=generator), torch.randn(5, 4, generator=generator)
    R = B @ A
    R[0, 0] += 0.1
    exact = (R.double() - B.double() @ A.double()) @ S.double()
    wanted = (exact * (R.double() - B.double() @ A.double())).sum().item()
    before, after = energies_with_path(R, A, B, S)
    assert after == pytest.approx(wanted, rel=1e-3)
    assert before == pytest.approx(((R.double() @ S.double()) * R.double()).sum().item(), rel=1e-5)
