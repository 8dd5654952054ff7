"""Rounds: the weight is compressed for what its low-rank path leaves, and the path solved again, in turn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compress import COMPRESSORS, PRUNERS
from eora_lab.run.fit import Steps, fit_group
from eora_lab.run.recipe import Recipe

BASES = [
    *({"compressor": name, "sparsity": "2:4", "bits": bits} for name in PRUNERS for bits in (16, 3)),
    {"compressor": "wanda", "sparsity": "0.5", "bits": 16},
    *({"compressor": name, "bits": bits} for name in ("rtn", "gptq") for bits in (2, 4)),
    {"compressor": "gptq", "bits": 3, "zero_point": "integer", "scale_dtype": "float16", "mse": True},
    {"compressor": "rtn", "grid": "nvfp4"},
    {"compressor": "gptq", "grid": "nf4"},
    {"compressor": "rtn", "grid": "q4_0"},
]


def layer(seed, decades=3, out_features=16, in_features=32, tokens=40):
    """A weight, and statistics of correlated inputs with a channel that is always zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator)
    x = torch.randn(tokens, in_features, generator=generator) @ mixing
    x[:, seed % in_features] = 0
    statistics = InputStatistics(in_features)
    statistics.update(x * torch.logspace(0, -decades, in_features))
    return weight, statistics


def fitted(base, weight, statistics, rank, step=None, **more):
    """The answer to a layer, and its output error in float64 with the path as it is stored."""
    recipe = Recipe(**({} if "grid" in base else {"group_size": 16}) | base | more)
    steps = Steps(recipe)
    fit = fit_group(steps.group(["layer"], [weight], statistics), statistics, steps, rank, step)
    A, B = (factor.double() for factor in fit.factors.dense())
    aim = weight.double() if step is None else weight.double() + step
    left = aim - fit.compressed[0].dense().double() - B @ A
    return fit, output_energy(left, statistics.second_moment.double())


@pytest.mark.parametrize("base", BASES, ids=lambda base: "-".join(map(str, base.values())))
@given(seed=st.integers(0, 9999), rank=st.integers(1, 12), factor_bits=st.sampled_from([16, 4]), aim=st.booleans())
@settings(deadline=None, max_examples=4)
def test_more_rounds_never_end_further_away(base, seed, rank, factor_bits, aim):
    """Errors with the path as it is stored, of whatever the layer aims at."""
    weight, statistics = layer(seed)
    step = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) if aim else None
    losses = [
        fitted(base, weight, statistics, rank, step, rounds=rounds, factor_bits=factor_bits)[1] for rounds in (1, 2, 4)
    ]
    assert losses[1] <= losses[0] * (1 + 1e-4) and losses[2] <= losses[1] * (1 + 1e-4)  # summed in float32 there


def test_every_compressor_gains_by_rounds():
    assert {base["compressor"] for base in BASES} == set(COMPRESSORS)
    for base in BASES:
        weight, statistics = layer(0, decades=1)
        once, more = (fitted(base, weight, statistics, 6, rounds=rounds)[1] for rounds in (1, 5))
        assert more < 0.97 * once or base["compressor"] == "gptq", base  # whose errors leave a path little to take up


def test_a_pruner_chooses_the_mask_anew():
    weight, statistics = layer(1)
    base = {"compressor": "wanda", "sparsity": "2:4", "bits": 16}
    masks = [fitted(base, weight, statistics, 6, rounds=rounds)[0].compressed[0].mask for rounds in (1, 3)]
    assert (masks[0] != masks[1]).any()
    assert (masks[1].unflatten(1, (-1, 4)).sum(-1) == 2).all()
