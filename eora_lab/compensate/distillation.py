"""A step of a layer's low-rank path that brings the predictions of the whole model closer to the original's.

Newton's step with the Kronecker-factored Fisher information as the curvature (K-FAC; Martens and Grosse, arXiv
1503.05671, eq. 1 to 3), of which the path takes what matrices of its rank next to it can (Absil, Mahony and Sepulchre,
Optimization Algorithms on Matrix Manifolds, 2008, chapter 4), bounded.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.distillation import Pull
from eora_lab.compensate.lowrank import LowRank

DAMPING = 0.1  # of the mean diagonal of S; F's own is as large


class DistillationStep:
    """The step of one layer from its path B A, to be taken by any share.

    With F = L Lᵀ and S = T Tᵀ, both damped, Newton's step is Δ = -F^-1 G S^-1. In the metric, where a change X of the
    weight is Lᵀ X T and moves the predictions by half of its squared norm, in nats a token, that is M = -L^-1 G T^-T.
    To first order the matrices of the path's rank next to Lᵀ B A T = U C Vᵀ differ from it by those of the tangent
    space, and of M that is U Uᵀ M + (I - U Uᵀ) M V Vᵀ. It leaves the noise of G, which few tokens measured, out of all
    other directions; damping keeps it out of those that inputs and gradients hardly take.

    A: (rank, in), B: (out, rank), the path as it is.
    bound: nats a token, that the step may move the predictions at the most.
    length: what it moves them by, with all of it taken.
    """

    def __init__(self, pull: Pull, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], bound: float):
        S = pull.inputs.second_moment.double()
        damped = S + DAMPING * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype, device=S.device)
        self._L, self._T = pull.outputs.root(), torch.linalg.cholesky(damped)
        half = torch.linalg.solve_triangular(self._L, pull.gradient.double(), upper=False)
        M = -torch.linalg.solve_triangular(self._T, half.T, upper=False).T  # (out, in)
        self._U, left = torch.linalg.qr(self._L.T @ B.double())
        self._V, right = torch.linalg.qr(self._T.T @ A.double().T)
        self._C = left @ right.T  # (rank, rank)
        self._down, across = M.T @ self._U, M @ self._V  # (in, rank), (out, rank)
        self._beside = across - self._U @ (self._U.T @ across)
        moved = (self._down.square().sum() + self._beside.square().sum()).item() / 2
        eta = min(1.0, math.sqrt(bound / moved)) if moved else 0.0
        self._down, self._beside, self.length = eta * self._down, eta * self._beside, eta**2 * moved

    def taken(self, share: float) -> LowRank:
        """The best path of the same rank, in the metric, for B A and that share of the step."""
        P = torch.cat([self._U, share * self._beside], 1)  # (out, 2 rank); P Qᵀ is what to approximate
        Q = torch.cat([self._V @ self._C.T + share * self._down, self._V], 1)
        (P, left), (Q, right) = torch.linalg.qr(P), torch.linalg.qr(Q)
        U, values, Vh = torch.linalg.svd(left @ right.T)
        rank = self._C.shape[0]
        B = torch.linalg.solve_triangular(self._L.T, P @ (U[:, :rank] * values[:rank]), upper=True)
        A = torch.linalg.solve_triangular(self._T.T, Q @ Vh[:rank].T, upper=True).T
        return LowRank(A=A.float(), B=B.float(), spectrum=values.square())
