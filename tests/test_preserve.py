"""A part of the weight is kept from the compressor (SRR): never worse, and better where the weight has such a part."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eora_lab import EoraLabError, Recipe
from eora_lab.compensate.preserve import preserved
from eora_lab.compress import rtn
from tests.test_rounds import fitted, layer
from tests.tiny import SMALL, compress, tiny_model, tiny_tokens

TWO_BITS = {"compressor": "rtn", "bits": 2}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.lists(st.floats(0, 1), min_size=1, max_size=8), st.data())
def test_k_leaves_the_least_product_of_shares(weight, error, data):
    rank = data.draw(st.integers(0, min(len(weight), len(error))))
    weight, error = sorted(weight, reverse=True), sorted(error, reverse=True)
    k = preserved(torch.tensor(weight), torch.tensor(error), (sum(weight), sum(error)), rank)
    left = [sum(weight[j:]) * sum(error[rank - j :]) for j in range(rank + 1)]
    assert 0 <= k <= rank and left[k] <= min(left) + 1e-5


def spiked(seed: int, strength: float):
    """A weight with two components that stand out, and statistics of its inputs."""
    weight, statistics = layer(seed, decades=1)
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(16, 2, generator=generator), torch.randn(2, 32, generator=generator)
    return weight + strength * u @ v, statistics


@given(seed=st.integers(0, 999), rank=st.integers(1, 10), strength=st.sampled_from([0.0, 2.0, 20.0]))
@settings(deadline=None, max_examples=25)
def test_it_leaves_no_more_than_the_plain_base_and_than_two_parts_of_the_rank(seed, rank, strength):
    weight, statistics = spiked(seed, strength)
    plain = fitted(TWO_BITS, weight, statistics, rank)[1]
    found = fitted(TWO_BITS, weight, statistics, rank, preserve=True)[1]
    assert found <= plain * (1 + 1e-4)
    S = statistics.second_moment.double()
    values, Q = torch.linalg.eigh(S)
    T, back = Q * values.clamp_min(0).sqrt(), torch.linalg.pinv(Q * values.clamp_min(0).sqrt(), rtol=1e-7)

    def best(matrix: torch.Tensor, count: int) -> torch.Tensor:
        U, sigma, Vh = torch.linalg.svd(matrix.double() @ T, full_matrices=False)
        return (U[:, :count] * sigma[:count]) @ Vh[:count] @ back

    def energies(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(matrix.double() @ T).square()

    grid = {"bits": 2, "group_size": 16}
    seen = [energies(weight), energies(weight - rtn(weight, statistics, **grid).dense())]
    k = preserved(*seen, (seen[0].sum().item(), seen[1].sum().item()), rank)
    first = best(weight, k)
    E = weight.double() - first - rtn((weight - first).float(), statistics, **grid).dense().double()
    left = E - best(E, rank - k)
    assert found <= (left @ S @ left.T).trace().item() * (1 + 2e-3) + 1e-6 * plain


def test_it_pays_where_some_components_stand_out():
    weight, statistics = spiked(0, 20.0)
    plain, found = (fitted(TWO_BITS, weight, statistics, 4, preserve=choice)[1] for choice in (False, True))
    assert found < 0.3 * plain
    more = fitted(TWO_BITS, weight, statistics, 4, preserve=True, rounds=3)[1]
    assert more <= found * (1 + 1e-4)


def test_a_pass_of_all_parts_takes_it_and_says_so():
    given_ = SMALL | {"bits": 2, "method": "eora_fisher", "inputs": "original", "shared_factors": True}
    once, kept = (compress(tiny_model("llama"), tiny_tokens(), **given_, preserve=choice) for choice in (False, True))
    assert kept.base == "rtn 2-bit g32 preserved"
    assert sum(one.nats_after for one in kept.layers) <= 1.001 * sum(one.nats_after for one in once.layers)
    with pytest.raises(EoraLabError, match="take eora or eora_fisher, or leave preserve out"):
        Recipe(method="svd", preserve=True)
