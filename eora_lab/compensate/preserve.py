"""Ranks that keep a part of the weight from the compressor: Preserve-Then-Quantize (SRR, arXiv 2602.02001).

k of the r ranks hold the largest components of W in the metric, [W T]_k with S = T Tᵀ; W^ compresses what is left; the
others mend the error E of that. With ρ_j the share of the energy that j components leave,

    k = argmin ρ_k(W T) ρ_(r-k)(E T),

for the error that the compressor makes grows with what it is exposed to, and of it the share ρ_(r-k) stays. Here E is
the error of W^ without anything preserved, where the paper takes a random one.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def preserved(
    weight: Float[Tensor, " values"], error: Float[Tensor, " others"], energies: tuple[float, float], rank: int
) -> int:
    """k, from 0 to the rank.

    weight, error: leading eigenvalues of W S Wᵀ and of E S Eᵀ (`LowRank.spectrum`), at least `rank` of them or all.
    energies: what all of their eigenvalues add up to.
    """
    shares = [_left(values, energy, rank) for values, energy in zip((weight, error), energies, strict=True)]
    return int((shares[0] * shares[1].flip(0)).argmin())


def _left(values: Float[Tensor, " values"], energy: float, rank: int) -> Float[Tensor, " ranks"]:
    """Share of the energy that 0, 1, ..., rank components leave."""
    removed = torch.zeros(rank + 1, dtype=torch.float64)
    removed[1 : len(values) + 1] = values[:rank].double().cpu()
    return (1 - removed.cumsum(0) / (energy or 1.0)).clamp_min(0)
