"""Principal components of the output error: the one computation behind every closed form.

Minimise tr((R - B A) M (R - B A)ᵀ) over rank r, for a metric M = T Tᵀ. The best rank-r approximation of R T is
U Uᵀ R T (Eckart-Young), U the top-r eigenvectors of R M Rᵀ, and B = U, A = Uᵀ R attains it even where M is singular.
With M = S this is EoRA; with a diagonal M it is one of its rivals.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate import krylov
from eora_lab.compensate.lowrank import LowRank

COLUMNS = 1024  # of S that are float64 at once


def principal_errors(
    residual: Float[Tensor, "out in"], metric: InputStatistics | Float[Tensor, " in"], rank: int
) -> LowRank:
    """The rank-r optimum under a metric: a layer's statistics (M = S), or a diagonal given as (in,) weights.

    Solves on the smaller side, in float64: R M Rᵀ (out x out), or Tᵀ Rᵀ R T (in x in). Large layers go through a
    Krylov space in the residual's precision, unless its error bound is not met; their spectrum ends at the rank.
    """
    dtype = residual.dtype if residual.dtype.itemsize >= 4 else torch.float32
    if krylov.worth_it(residual, rank):
        R = residual.to(dtype)
        M = (metric if isinstance(metric, Tensor) else metric.second_moment).to(dtype)
        if found := krylov.top_eigenvectors(R, M, rank):
            U, values = found
            return LowRank(A=U.T @ R, B=U.contiguous(), spectrum=values.clamp_min(0))
    R = residual.double()
    out_features, in_features = R.shape
    if out_features <= in_features:
        RM = R * metric.double() if isinstance(metric, Tensor) else in_double(R, metric.second_moment)
        values, vectors = torch.linalg.eigh(RM @ R.T)
        U = vectors.flip(1)[:, :rank]  # (out, rank)
    else:
        RT = R * metric.double().sqrt() if isinstance(metric, Tensor) else R @ metric.root()
        values, vectors = torch.linalg.eigh(RT.T @ RT)
        # orthonormal even where an eigenvalue is zero, and nested: column k depends on columns up to k only
        U = torch.linalg.qr(RT @ vectors.flip(1)[:, :rank]).Q
    return LowRank(A=(U.T @ R).to(dtype), B=U.to(dtype).contiguous(), spectrum=values.flip(0).clamp_min(0))


def in_double(R: Float64[Tensor, "out in"], S: Float[Tensor, "in in"]) -> Float64[Tensor, "out in"]:
    """R S in float64, without a copy of all of S, which is the largest matrix of a layer."""
    found = torch.empty_like(R)
    for start in range(0, len(S), COLUMNS):
        found[:, start : start + COLUMNS] = R @ S[:, start : start + COLUMNS].double()
    return found
