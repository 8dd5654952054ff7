"""Streaming statistics of a linear layer's input: the one measurement that everything else uses.

S = E[x xᵀ] and m = E|x| serve the GPTQ Hessian (2S), the scales of the diagonal rivals, EoRA's projection and the
error of any candidate. Linears that read the same input share one object.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.files import write_safetensors

CHANNELS_A_TOKEN = 32  # below in_features / 32 tokens, GPTQ no longer beats round to nearest on other tokens


class InputStatistics:
    """Running means over tokens of one input.

    second_moment: S = E[x xᵀ], (in_features, in_features) float32, not centred. Raises EoraLabError where only its
                   diagonal is known (`from_power`).
    mean_abs:      m = E|x|, (in_features,) float32.
    tokens:        how many tokens were seen; every token weighs the same, however they were batched.
    pooled_tokens: tokens of other experts that are mixed in, where this is one of a mixture.
    held_out:      the same of tokens that were kept apart to judge by, or None.
    drift:         D = E[(x - x̂) x̂ᵀ], (in_features, in_features) float32, where x̂ is the input that was measured and x
                   that of the original model at the same token; None where that is not known, and so of no drift.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", name: str = "input"):
        self.name = name
        self.tokens = 0
        self.pooled_tokens = 0.0
        self._second_moment: Tensor | None = torch.zeros(in_features, in_features, device=device)
        self._power: Tensor | None = None
        self.mean_abs = torch.zeros(in_features, device=device)
        self.held_out: InputStatistics | None = None
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
        statistics = cls(0, name=name)
        statistics._second_moment, statistics._power = None, power.float()
        statistics.mean_abs = (statistics._power * (2 / torch.pi)).sqrt()
        statistics.tokens = tokens
        return statistics

    @property
    def second_moment(self) -> Float[Tensor, "in in"]:
        """S, as said above."""
        if self._second_moment is None:
            raise EoraLabError(
                "only E[x²] of every input channel is known here (an imatrix), and this needs E[x xᵀ]: take a method "
                "that needs no more, such as qera_approx, or measure the inputs"
            )
        return self._second_moment

    @second_moment.setter
    def second_moment(self, second_moment: Float[Tensor, "in in"]) -> None:
        self._second_moment, self._power = second_moment, None

    @property
    def diagonal(self) -> bool:
        """Whether no more than the diagonal of S is known."""
        return self._second_moment is None

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
        identity = InputStatistics.from_second_moment(torch.eye(self.in_features, device=self.second_moment.device))
        identity.held_out = identity if held_out else None
        return identity

    @property
    def in_features(self) -> int:
        """Channels of the input."""
        return len(self.mean_abs)

    @torch.no_grad()
    def update(self, x: Float[Tensor, "... in"]) -> None:
        """Add the tokens of one batch. Raises EoraLabError on NaN or Inf, naming the layer."""
        x = x.reshape(-1, x.shape[-1]).float()  # (tokens, in)
        if not all_finite(x):
            raise EoraLabError(f"{self.name}: NaN or Inf in its input after {self.tokens} tokens")
        new = self.tokens + len(x)
        if new == 0:
            return
        kept, added = self.tokens / new, 1 / new
        self.second_moment.addmm_(x.T, x, beta=kept, alpha=added)
        self.mean_abs.mul_(kept).add_(x.abs().sum(0), alpha=added)
        self.tokens, self._root = new, None

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
        before = torch.zeros_like(self.second_moment) if self.drift is None else self.drift
        off, added = original.reshape(x.shape).float() - x, 1 / self.tokens
        self.drift = before.addmm_(off.T, x, beta=1 - len(x) * added, alpha=added)

    def merge(self, other: "InputStatistics") -> "InputStatistics":
        """Statistics of both token sets together, for passes split over processes."""
        merged = InputStatistics(self.in_features, self.second_moment.device, self.name)
        merged.tokens = self.tokens + other.tokens
        share = other.tokens / max(merged.tokens, 1)
        merged.second_moment = torch.lerp(self.second_moment, other.second_moment, share)
        merged.mean_abs = torch.lerp(self.mean_abs, other.mean_abs, share)
        kept_apart = [s.held_out for s in (self, other) if s.held_out]
        merged.held_out = kept_apart[0].merge(kept_apart[1]) if len(kept_apart) == 2 else next(iter(kept_apart), None)
        return merged

    def root(self) -> Float[Tensor, "in in"]:
        """T with T Tᵀ = S, float64, from the eigendecomposition, so that a singular S is no special case. Kept."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.second_moment.double())
            self._root = vectors * values.clamp_min(0).sqrt()
        return self._root

    def save(self, path: Path | str) -> None:
        """Write to a safetensors file."""
        tensors = {"second_moment": self.second_moment, "mean_abs": self.mean_abs}
        metadata = {"tokens": str(self.tokens), "pooled_tokens": str(self.pooled_tokens), "name": self.name}
        if self.held_out:
            tensors["held_out.second_moment"] = self.held_out.second_moment
            tensors["held_out.mean_abs"] = self.held_out.mean_abs
            metadata["held_out.tokens"] = str(self.held_out.tokens)
        write_safetensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: Path | str) -> "InputStatistics":
        """Read what `save` wrote. Raises EoraLabError when the file is missing or is something else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}

                def read(prefix: str) -> InputStatistics:
                    statistics = cls(0, name=metadata["name"])
                    statistics.tokens = int(metadata[f"{prefix}tokens"])
                    statistics.second_moment = file.get_tensor(f"{prefix}second_moment")
                    statistics.mean_abs = file.get_tensor(f"{prefix}mean_abs")
                    return statistics

                statistics = read("")
                statistics.pooled_tokens = float(metadata.get("pooled_tokens", 0))
                if "held_out.tokens" in metadata:
                    statistics.held_out = read("held_out.")
        except (OSError, KeyError, SafetensorError) as error:
            raise EoraLabError(f"{path}: not a statistics file ({error})") from error
        return statistics


def check_second_moment(second_moment: Shaped[Tensor, "..."]) -> None:
    """Raise EoraLabError unless S is a finite, symmetric square matrix."""
    if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise EoraLabError(f"the second moment must be a square matrix, not {tuple(second_moment.shape)}")
    if not all_finite(second_moment):
        raise EoraLabError("the second moment has NaN or Inf entries")
    if not torch.allclose(second_moment, second_moment.T, rtol=0, atol=1e-4 * float(second_moment.abs().max())):
        raise EoraLabError("the second moment is not symmetric")


def all_finite(matrix: Shaped[Tensor, "..."]) -> bool:
    """Whether there is no NaN and no Inf. A finite sum, which takes one pass and no memory, settles it."""
    return bool(torch.isfinite(matrix.sum()) or torch.isfinite(matrix).all())


def output_energy(
    matrix: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"] | Float[Tensor, " in"]
) -> float:
    """E|M x|² = tr(M S Mᵀ); of the diagonal (in,) of S alone, as if the channels of x were not correlated."""
    if second_moment.ndim == 1:
        return (matrix.square() @ second_moment).sum().item()
    return ((matrix @ second_moment) * matrix).sum().item()
