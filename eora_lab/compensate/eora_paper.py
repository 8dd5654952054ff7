"""EoRA step by step as the paper writes it (arXiv 2410.21271, section 3): for teaching, and to check `eora` against."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.lowrank import LowRank

NULL = 1e-14  # eigenvalues below this share of the largest are rounding noise of a float64 decomposition


def eora_paper(
    residual: Float[Tensor, "out in"],
    statistics: InputStatistics,
    rank: int,
    null_space: Literal["drop", "clamp"] = "drop",
) -> LowRank:
    """Project R into the eigenspace of S, take its SVD there, project back. float64 throughout.

    S = Q Λ Qᵀ,  R' = R Q Λ^½,  R' ≈ B' A' (truncated SVD),  B = B',  A = A' Λ^-½ Qᵀ.
    null_space: what Λ^-½ is where Λ is zero, which the paper leaves open. "drop": 0, the pseudo-inverse, which is
        optimal. "clamp": Λ is raised to NULL of its largest value in both projections.
    """
    values, Q = torch.linalg.eigh(statistics.second_moment.double())
    floor = NULL * values.max().clamp_min(torch.finfo(values.dtype).tiny)
    if null_space == "clamp":
        scale = values.clamp_min(floor).sqrt()
        inverse = 1 / scale
    else:
        scale = torch.where(values > floor, values.clamp_min(0).sqrt(), 0.0)
        inverse = torch.where(values > floor, 1 / scale, 0.0)
    projected = residual.double() @ Q * scale  # (out, in)
    U, sigma, Vt = torch.linalg.svd(projected, full_matrices=False)
    A = (sigma[:rank, None] * Vt[:rank]) * inverse @ Q.T
    dtype = residual.dtype if residual.dtype.itemsize >= 4 else torch.float32
    return LowRank(A=A.to(dtype), B=U[:, :rank].to(dtype), spectrum=sigma.square())
