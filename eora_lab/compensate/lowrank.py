"""The answer of every solver: two thin factors and what they gained."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The compensation B A, added to a compressed weight.

    A:        (rank, in_features), PEFT's lora_A.
    B:        (out_features, rank), PEFT's lora_B.
    spectrum: eigenvalues of the solver's own error covariance, descending, float64. Entry k is the loss that rank
              k + 1 removes, so the sum of those from `rank` on is the loss that stays.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    spectrum: Float[Tensor, " eigenvalues"]

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]

    def dense(self) -> Float[Tensor, "out in"]:
        """B A."""
        return self.B @ self.A

    def truncate(self, rank: int) -> "LowRank":
        """The answer at a lower rank: solutions are nested, so a rank sweep is one solve."""
        return replace(self, A=self.A[:rank], B=self.B[:, :rank])

    def balanced(self) -> "LowRank":
        """The same product with |row k of A| = |column k of B|, the form to round to few bits."""
        norm_a, norm_b = self.A.norm(dim=1), self.B.norm(dim=0)
        ratio = torch.where((norm_a > 0) & (norm_b > 0), (norm_b / norm_a).sqrt(), torch.ones_like(norm_a))
        return replace(self, A=self.A * ratio[:, None], B=self.B / ratio)

    def losses(
        self, residual: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"]
    ) -> Float[Tensor, " ranks"]:
        """E|(R - B A) x|² of this answer cut to the ranks 0, 1, ..., its own. float64, from S alone.

        tr((R - BA) S (R - BA)ᵀ) = tr(R S Rᵀ) - 2 Σ_k b_kᵀ R S a_k + Σ_jk (b_jᵀ b_k)(a_jᵀ S a_k), sums up to the rank.
        """
        A, B, R, S = (matrix.double() for matrix in (self.A, self.B, residual, second_moment))
        RS, AS = R @ S, A @ S
        met = (B * (RS @ A.T)).sum(0)  # (rank,)
        pairs = ((B.T @ B) * (AS @ A.T)).cumsum(0).cumsum(1).diagonal()
        losses = (RS * R).sum() - 2 * met.cumsum(0) + pairs
        return torch.cat([(RS * R).sum()[None], losses]).clamp_min(0)
