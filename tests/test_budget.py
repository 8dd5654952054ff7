"""Rank budgets against brute force, and their bounds."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eora_lab import EoraLabError
from eora_lab.run.budget import Budget, LayerSpectrum, allocate_ranks


def layer(seed: int, out_features: int, in_features: int, signal: float = 1.0) -> LayerSpectrum:
    values = torch.rand(min(out_features, in_features), generator=torch.Generator().manual_seed(seed)).double() ** 3
    return LayerSpectrum(values.sort(descending=True).values, signal, out_features, in_features)


def loss(layers, ranks, objective) -> float:
    weight = {name: 1 / layer.signal if objective == "relative" else 1.0 for name, layer in layers.items()}
    return sum(weight[name] * layer.spectrum[ranks[name] :].sum().item() for name, layer in layers.items())


def parameters(layers, ranks) -> int:
    return sum(ranks[name] * (layer.in_features + layer.out_features) for name, layer in layers.items())


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=3),
    st.integers(0, 6),
    st.sampled_from(["relative", "absolute"]),
    st.integers(0, 2**16),
)
def test_greedy_is_the_optimum_of_its_budget(signals, average, objective, seed):
    layers = {str(i): layer(seed + i, 6, 10 - 2 * i, signal) for i, signal in enumerate(signals)}
    ranks = allocate_ranks(layers, average, Budget(objective, multiple=1))
    spent = parameters(layers, ranks)
    assert spent <= average * sum(one.in_features + one.out_features for one in layers.values())
    best = min(
        loss(layers, dict(zip(layers, choice, strict=True)), objective)
        for choice in itertools.product(range(7), repeat=len(layers))
        if parameters(layers, dict(zip(layers, choice, strict=True))) <= spent
        and all(r <= min(one.in_features, one.out_features) for r, one in zip(choice, layers.values(), strict=True))
    )
    # greedy may trade its last step for a cheaper one that fits; the first steps are the optimum of what they spend
    one_step = max(one.spectrum[0].item() / (one.signal if objective == "relative" else 1) for one in layers.values())
    assert best <= loss(layers, ranks, objective) <= best + one_step
    if len({one.in_features for one in layers.values()}) == 1:
        assert loss(layers, ranks, objective) == pytest.approx(best)


@given(st.integers(1, 24), st.integers(0, 2**16))
def test_equal_layers_reach_the_exact_optimum(average, seed):
    layers = {str(i): layer(seed + i, 24, 24) for i in range(4)}
    ranks = allocate_ranks(layers, average, Budget("absolute", multiple=1))
    gains = torch.cat([one.spectrum for one in layers.values()]).sort(descending=True).values
    assert sum(ranks.values()) == 4 * average
    assert loss(layers, ranks, "absolute") == pytest.approx(gains[4 * average :].sum().item())


@given(st.integers(1, 23), st.lists(st.floats(0.01, 100), min_size=2, max_size=4), st.integers(0, 2**16))
def test_a_relative_budget_weighs_every_layer_by_its_signal(average, signals, seed):
    """Layers of one size, so that greedy is exact: the best steps of all layers together, by gain over signal."""
    layers = {str(i): layer(seed + i, 24, 24, signal) for i, signal in enumerate(signals)}
    ranks = allocate_ranks(layers, average, Budget("relative", multiple=1))
    gains = torch.cat([one.spectrum / one.signal for one in layers.values()]).sort(descending=True).values
    left = gains[len(layers) * average :].sum().item()
    assert loss(layers, ranks, "relative") == pytest.approx(left, rel=1e-9, abs=1e-12)


def test_bounds_multiples_and_patterns():
    layers = {f"{kind}.{i}": layer(i, 64, 96) for i in range(4) for kind in ("mlp", "attention")}
    ranks = allocate_ranks(layers, 20, Budget("absolute", minimum=8, maximum=32, multiple=8))
    assert all(8 <= r <= 32 and r % 8 == 0 for r in ranks.values())
    assert len(set(ranks.values())) > 1
    only = allocate_ranks(layers, 20, Budget("absolute", only="^mlp"))
    assert all(only[name] == 0 for name in layers if name.startswith("attention"))
    assert parameters(layers, only) > 0.8 * 20 * 160 * 8  # the others got their share
    uniform = allocate_ranks(layers, 16, Budget("uniform", only="mlp"))
    assert set(uniform.values()) == {0, 32}


@pytest.mark.parametrize(
    ("average", "budget", "message"),
    [
        (16, {"only": "vision"}, "no layer matches 'vision'; names are like a"),
        (16, {"only": "("}, "'\\(' is no regular expression: missing"),
        (16, {"minimum": 4}, "multiples of 8"),
        (16, {"minimum": -8}, "from 0 or more, not -8 to None"),
        (16, {"minimum": 16, "maximum": 8}, "from 0 or more, not 16 to 8"),
        (16, {"minimum": 72}, "72 is more than a can have: 64"),
        (16, {"minimum": 24}, "rank 24 in every layer is more than an average rank of 16"),
    ],
)
def test_contradictions(average, budget, message):
    with pytest.raises(EoraLabError, match=message):
        allocate_ranks({"a": layer(0, 64, 96), "b": layer(1, 64, 96)}, average, Budget("absolute", **budget))
