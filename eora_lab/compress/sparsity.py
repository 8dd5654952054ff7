"""Which weights a pruner keeps: n of every m inputs, or a share of all."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eora_lab.errors import EoraLabError


@dataclass(frozen=True)
class Sparsity:
    """n:m keeps the n highest scores of every m consecutive inputs (Mishra et al., arXiv 2104.08378).

    Unstructured, m = 0: the given share of the weights is pruned, wherever the scores are lowest.
    """

    n: int
    m: int
    share: float

    @classmethod
    def parse(cls, text: str) -> "Sparsity":
        """Read "2:4", or "0.5". Raises EoraLabError on anything else."""
        try:
            if ":" in text:
                n, m = map(int, text.split(":"))
                sparsity = cls(n, m, 1 - n / m)
                usable = 0 < n < m
            else:
                sparsity = cls(0, 0, float(text))
                usable = 0 < sparsity.share < 1
        except (ValueError, ZeroDivisionError):
            usable = False
        if not usable:
            raise EoraLabError(f"sparsity must be n:m such as 2:4, or a share between 0 and 1, not {text!r}")
        return sparsity

    def check(self, in_features: int) -> None:
        """Raise EoraLabError unless a layer's inputs come in groups of m."""
        if self.m and in_features % self.m:
            raise EoraLabError(f"sparsity {self.n}:{self.m} does not fit {in_features} input features")

    def keep(self, score: Float[Tensor, "out in"], by_row: bool = False) -> Bool[Tensor, "out in"]:
        """The mask of the weights to keep. by_row: prune the same share of every row."""
        if self.m:
            rivals, kept = score.unflatten(1, (-1, self.m)), self.n
        else:
            rivals = score if by_row else score.flatten()
            kept = rivals.shape[-1] - round(self.share * rivals.shape[-1])
        mask = torch.zeros_like(rivals, dtype=torch.bool)
        return mask.scatter_(-1, rivals.topk(kept, sorted=False).indices, True).view(score.shape)
