"""Streaming statistics of the gradients at a linear layer's output: what an error there costs the model."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.moments import Moments, check_second_moment
from eora_lab.errors import EoraLabError

DAMPING = 0.1


class OutputStatistics(Moments):
    """F = E[g gᵀ] over tokens, g = d loss / d y at the output y of one linear, in nats.

    The loss is that of all predicted tokens of a sequence, summed. If a weight is off by D, half of tr(F D S Dᵀ) is
    what that adds to the loss, in nats a token and to second order, where x and g are taken to be independent:
    the Kronecker-factored Fisher information (Martens and Grosse, arXiv 1503.05671, eq. 1 to 3).

    second_moment: F, (out_features, out_features) float32, not centred.
    damping:       share of the mean of F's diagonal that is added to it, for a finite number of tokens and because the
                   loss is not the metric alone.
    Linears that share an input do not share their F. The rest as for `InputStatistics`.
    """

    of: ClassVar = "output gradient"
    held_out: "OutputStatistics | None"

    def __init__(self, out_features: int, device: torch.device | str = "cpu", name: str = "output"):
        super().__init__(out_features, device, name)
        self.damping = DAMPING
        self._root: Tensor | None = None

    @classmethod
    def from_second_moment(
        cls, second_moment: Float[Tensor, "rows columns"], damping: float = DAMPING
    ) -> "OutputStatistics":
        """Wrap a plain F. Raises EoraLabError unless it is a finite, symmetric square matrix."""
        check_second_moment(second_moment)
        statistics = cls(0)
        statistics.second_moment, statistics.damping, statistics.tokens = second_moment, damping, 1
        return statistics

    def damped(self, damping: float) -> "OutputStatistics":
        """The same F with another damping."""
        other = OutputStatistics(0, name=self.name)
        other.second_moment, other.damping, other.tokens = self.second_moment, damping, self.tokens
        return other

    @property
    def out_features(self) -> int:
        """Channels of the output."""
        return self.features

    def _add(self, v: Float[Tensor, "tokens out"]) -> None:
        super()._add(v)
        self.forget()

    def root(self) -> Float[Tensor, "out out"]:
        """L, lower triangular float64, with L Lᵀ = F + damping (tr F / out) I; of no gradient at all, of I.

        Kept until `forget`. Raises EoraLabError where the damping is too small for the roundings of F.
        """
        if self._root is not None:
            return self._root
        F = self.second_moment.double()
        damped = F + self.damping * F.diagonal().mean() * torch.eye(len(F), dtype=F.dtype, device=F.device)
        L, failed = torch.linalg.cholesky_ex(damped if F.any() else torch.eye(len(F)).to(F))
        if failed:
            raise EoraLabError(f"{self.name}: a damping of {self.damping} is too small for its F: take 0.01 or more")
        self._root = L
        return L

    def forget(self) -> None:
        """Drop the root: statistics of all layers are held together, and it is larger than F."""
        self._root = None

    @property
    def seen(self) -> bool:
        """Whether there was any gradient."""
        return bool(self.second_moment.any())

    def whitened(self, error: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Lᵀ D, float64: its output energy E|Lᵀ D x|² is what D costs with the damped F."""
        return self.root().T @ error.double()

    def unwhitened(self, B: Float[Tensor, "out rank"]) -> Float[Tensor, "out rank"]:
        """L^-T B, float64: takes a factor of a whitened error back."""
        return torch.linalg.solve_triangular(self.root().T, B.double(), upper=True)

    def cost(self, error: Float[Tensor, "out in"], metric: Float[Tensor, "*in in"]) -> float:
        """tr(F D S Dᵀ) of an error D of the weight, with F as it is. Half of it is nats a token, see above.

        metric: S, or its diagonal (in,), see `InputStatistics.metric`.
        """
        through = error @ metric if metric.ndim == 2 else error * metric
        return ((self.second_moment @ error) * through).sum().item()
