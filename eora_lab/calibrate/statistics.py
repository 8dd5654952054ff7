"""Streaming statistics of a linear layer's input: the one measurement that everything else uses.

S = E[x xᵀ] and m = E|x| serve the GPTQ Hessian (2S), the scales of the diagonal rivals, EoRA's projection and the
error of any candidate. Linears that read the same input share one object.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.moments import Moments, check_second_moment
from eora_lab.errors import EoraLabError

CHANNELS = 512  # of an input, of which errors are taken at once
CHANNELS_A_TOKEN = 32  # below in_features / 32 tokens, GPTQ no longer beats round to nearest on other tokens


class InputStatistics(Moments):
    """Means over tokens of one input.

    second_moment: S = E[x xᵀ], (in_features, in_features) float32, not centred. Raises EoraLabError where only its
                   diagonal is known (`from_power`).
    mean_abs:      m = E|x|, (in_features,) float32.
    tokens:        how many tokens were seen; every token weighs the same, however they were batched.
    pooled_tokens: tokens of other experts that are mixed in, where this is one of a mixture.
    held_out:      the same of tokens that were kept apart to judge by, or None.
    drift:         D = E[(x - x̂) x̂ᵀ], (in_features, in_features) float32, where x̂ is the input that was measured and x
                   that of the original model at the same token; None where that is not known, and so of no drift.
    """

    of: ClassVar = "input"
    held_out: "InputStatistics | None"

    def __init__(self, in_features: int, device: torch.device | str = "cpu", name: str = "input"):
        super().__init__(in_features, device, name)
        self._mean_abs = torch.zeros(in_features, device=device)
        self._power: Tensor | None = None
        self.drift: Tensor | None = None
        self._root: Tensor | None = None

    @classmethod
    def from_second_moment(cls, second_moment: Float[Tensor, "rows columns"]) -> "InputStatistics":
        """Wrap a plain S. E|x| is then that of centred Gaussian channels, sqrt(2 S_ii / pi)."""
        check_second_moment(second_moment)
        statistics = cls(0)
        statistics.second_moment = second_moment
        statistics.mean_abs = (second_moment.diagonal().clamp_min(0) * (2 / torch.pi)).sqrt()
        statistics.tokens = 1
        return statistics

    @classmethod
    def from_power(cls, power: Float[Tensor, " in"], tokens: int = 1, name: str = "input") -> "InputStatistics":
        """Wrap E[x²] of every channel, the diagonal of S, of which nothing else is known. E|x| is as above."""
        statistics = cls(len(power), power.device, name)
        statistics._power = power.float()
        statistics.mean_abs = (statistics._power * (2 / torch.pi)).sqrt()
        statistics.tokens = tokens
        return statistics

    @property
    def second_moment(self) -> Float[Tensor, "in in"]:
        """S, as said above."""
        if self.diagonal:
            raise EoraLabError(
                "only E[x²] of every input channel is known here (an imatrix), and this needs E[x xᵀ]: take a method "
                "that needs no more, such as qera_approx, or measure the inputs"
            )
        return super().second_moment

    @second_moment.setter
    def second_moment(self, second_moment: Float[Tensor, "in in"]) -> None:
        self._power = self._root = None
        self._set(second_moment)

    @property
    def mean_abs(self) -> Float[Tensor, " in"]:
        """E|x|, as said above."""
        if self._sums:
            self._settle()
        return self._mean_abs

    @mean_abs.setter
    def mean_abs(self, mean_abs: Float[Tensor, " in"]) -> None:
        self._mean_abs = mean_abs

    @property
    def diagonal(self) -> bool:
        """Whether no more than the diagonal of S is known."""
        return self._power is not None

    @property
    def power(self) -> Float[Tensor, " in"]:
        """E[x²] of every channel, the diagonal of S."""
        return self.second_moment.diagonal() if self._power is None else self._power

    @property
    def metric(self) -> Float[Tensor, "*in in"]:
        """What errors are measured in, see `output_energy`: S, or its diagonal where no more is known."""
        return self.second_moment if self._power is None else self._power

    def or_identity(self, held_out: bool) -> "InputStatistics":
        """These statistics, or S = I where too few tokens were seen to tell S from noise.

        With S = I every method that looks at data becomes the one that does not: GPTQ rounds to nearest, Wanda and
        SparseGPT prune by magnitude, EoRA is SVD. held_out: whether held-out tokens are needed as well.
        """
        tokens = self.tokens + self.pooled_tokens
        enough = tokens >= self.in_features / CHANNELS_A_TOKEN and tokens
        if enough and (self.held_out or not held_out):
            return self
        if self.diagonal:
            return InputStatistics.from_power(torch.ones_like(self.power))
        identity = InputStatistics.from_second_moment(torch.eye(self.in_features, device=self.device))
        identity.held_out = identity if held_out else None
        return identity

    @property
    def in_features(self) -> int:
        """Channels of the input."""
        return self.features

    def means(self) -> dict[str, Float[Tensor, "..."]]:
        """S (in, in) and E|x| (in,)."""
        return super().means() | {"mean_abs": self.mean_abs}

    def _open(self) -> None:
        super()._open()
        self._sums.append(self._mean_abs.double() * self.tokens)

    def _settle(self) -> None:
        self._mean_abs = (self._sums.pop() / max(self.tokens, 1)).float()
        super()._settle()

    def _add(self, v: Float[Tensor, "tokens in"]) -> None:
        super()._add(v)
        self.sums()[-1].add_(v.abs().sum(0))
        self._root = None

    @torch.no_grad()
    def update_drift(self, x: Float[Tensor, "... in"], original: Float[Tensor, "... in"] | None) -> None:
        """Add the drift of the batch that was added last; without `original` once, no drift is known.

        original: the inputs of the original model at the same tokens.
        """
        x = x.reshape(-1, x.shape[-1]).float()
        known = self.drift is not None or self.tokens == len(x)
        if original is None or not known or not self.tokens:
            self.drift = None
            return
        before = torch.zeros(2 * [self.features], device=self.device) if self.drift is None else self.drift
        off, added = original.reshape(x.shape).float() - x, 1 / self.tokens
        self.drift = before.addmm_(off.T, x, beta=1 - len(x) * added, alpha=added)

    def root(self) -> Float[Tensor, "in in"]:
        """T with T Tᵀ = S, float64, from the eigendecomposition, so that a singular S is no special case. Kept."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.second_moment.double())
            self._root = vectors * values.clamp_min(0).sqrt()
        return self._root


def output_energy(
    matrix: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"] | Float[Tensor, " in"]
) -> float:
    """E|M x|² = tr(M S Mᵀ); of the diagonal (in,) of S alone, as if the channels of x were not correlated.

    S is symmetric: a little more than half of M S is multiplied, some channels at a time.
    """
    if second_moment.ndim == 1:
        return (matrix.square() @ second_moment).sum().item()
    channels = matrix.T.contiguous()  # parts of these are plain matrices, as products like them
    found = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for start in range(0, len(channels), CHANNELS):
        stop = start + CHANNELS
        part = second_moment[start:stop, :stop].clone()
        part[:, :start] *= 2  # these stand for those right of the diagonal too
        through = part @ channels[:stop]
        found += through.mul_(channels[start:stop]).sum()
    return found.item()


def energies_with_path(
    residual: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    second_moment: Float[Tensor, "in in"] | Float[Tensor, " in"],
) -> tuple[float, float]:
    """`output_energy` of R and of L = R - B A, from one product of a layer's size.

    E|R x|² = E|L x|² + 2 tr(L S Aᵀ Bᵀ) + tr(B A S Aᵀ Bᵀ), whose terms are thin; at the optimum the one between is 0.
    """
    left = residual - B @ A
    after = output_energy(left, second_moment)
    AS = A * second_moment if second_moment.ndim == 1 else A @ second_moment
    between, path = (AS * (B.T @ left)).sum().item(), ((AS @ A.T) * (B.T @ B)).sum().item()
    return after + 2 * between + path, after
