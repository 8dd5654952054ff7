"""A step of a layer's low-rank path that brings the predictions of the whole model closer to the original's.

Newton's step with the Kronecker-factored Fisher information as the curvature (K-FAC; Martens and Grosse, arXiv
1503.05671, eq. 1 to 3), bounded, and brought back to the rank of the path in the metric of that curvature.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.distillation import Pull
from eora_lab.compensate import StoredFactors, solve, store_factors

DAMPING = 0.1  # of the mean diagonal of S; F's own is as large


def distillation_step(pull: Pull, bound: float) -> Float[Tensor, "out in"]:
    """Δ = -η F^-1 G S^-1, float32, with F and S damped and η at most 1.

    G is measured on few tokens. In the metric, where a step's length is tr(F Δ S Δᵀ), its noise is the same in all
    directions, while what G says lies in those that inputs and gradients take: damping spares the step the others.
    bound: nats a token, that the step may move the predictions at the most: η makes half of its length that.
    """
    L = pull.outputs.root()
    S = pull.inputs.second_moment.double()
    S = S + DAMPING * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype, device=S.device)
    G = pull.gradient.double()
    step = -torch.cholesky_solve(torch.cholesky_solve(G, L).T, torch.linalg.cholesky(S)).T
    length = -(G * step).sum().item()  # tr(F Δ S Δᵀ)
    eta = min(1.0, math.sqrt(2 * bound / length)) if length > 0 else 0.0
    return (eta * step).float()


def distilled(
    path: Float[Tensor, "out in"], step: Float[Tensor, "out in"], pull: Pull, rank: int, bits: int, refit: bool
) -> StoredFactors:
    """The best path of that rank for B A + Δ, in the metric of F and S, as it is stored.

    path: B A. bits, refit: of its factors, see `store_factors`.
    """
    aim = path + step
    answer = solve("eora_fisher", aim, pull.inputs, rank, pull.outputs)
    return store_factors(answer, bits, (aim, pull.inputs) if refit else None, pull.outputs)
