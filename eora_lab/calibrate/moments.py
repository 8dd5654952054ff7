"""Means over the tokens of a stream of vectors: what the statistics of inputs and of outputs have in common.

While tokens come, sums are kept, of which the means are made once they are asked for. A sum is float64, and what is
added to it is the float32 product of one batch: as long as these are within 2^29 of each other, over their number,
nothing is rounded, so that the order does not matter, and processes that share the batches find the same bits as one.
"""

from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float, Float64, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.files import write_safetensors

M = TypeVar("M", bound="Moments")
PANEL = 256  # rows of a second moment that one product adds to


class Moments:
    """E[v vᵀ] of the tokens that were seen; every token weighs the same, however they were batched.

    second_moment: E[v vᵀ], (features, features) float32, not centred.
    tokens:        how many were seen.
    pooled_tokens: tokens of other experts that are mixed in, where this is one of a mixture.
    held_out:      the same of tokens that were kept apart to judge by, or None.
    """

    of: ClassVar = ""  # what v is, in messages and files

    def __init__(self, features: int, device: torch.device | str = "cpu", name: str = ""):
        self.name = name
        self.tokens = 0
        self.pooled_tokens = 0.0
        self.held_out: Moments | None = None
        self.features, self.device = features, torch.device(device)
        self._second_moment: Tensor | None = None  # None: nothing came yet
        self._sums: list[Tensor] = []

    @property
    def second_moment(self) -> Float[Tensor, "features features"]:
        """E[v vᵀ], as said above."""
        if self._sums:
            self._settle()
        if self._second_moment is None:
            self._second_moment = torch.zeros(self.features, self.features, device=self.device)
        return self._second_moment

    @second_moment.setter
    def second_moment(self, second_moment: Float[Tensor, "features features"]) -> None:
        self._set(second_moment)

    def _set(self, second_moment: Float[Tensor, "features features"]) -> None:
        self._second_moment, self._sums = second_moment, []
        self.features, self.device = len(second_moment), second_moment.device

    def means(self) -> dict[str, Float[Tensor, "..."]]:
        """All means by their names: `second_moment` (features, features), and what a subclass adds."""
        return {"second_moment": self.second_moment}

    def sums(self) -> list[Float64[Tensor, "..."]]:
        """The sums over tokens that the means are made of, to be added to; `tokens` goes with them.

        Of v vᵀ what is right of the diagonal, PANEL rows each, which take the memory of the means; and what a subclass
        adds.
        """
        if not self._sums:
            self._open()
        return self._sums

    def _open(self) -> None:
        moment, self._second_moment = self._second_moment, None
        for start in range(0, self.features, PANEL):
            if moment is None:
                sizes = min(PANEL, self.features - start), self.features - start
                panel = torch.zeros(sizes, dtype=torch.float64, device=self.device)
            else:
                panel = moment[start : start + PANEL, start:].double() * self.tokens
            self._sums.append(panel)

    def _settle(self) -> None:
        """Make the means of the sums, and drop these."""
        panels, moment = self._sums, torch.empty(self.features, self.features, device=self.device)
        for start in range(0, self.features, PANEL):  # what is right of the diagonal, then its mirror image
            rows, rest = slice(start, start + PANEL), slice(start + PANEL, None)
            moment[rows, start:] = panels.pop(0).div_(max(self.tokens, 1))
            moment[rest, rows] = moment[rows, rest].T
        self.second_moment = moment

    @torch.no_grad()
    def update(self, v: Float[Tensor, "... features"]) -> None:
        """Add the tokens of one batch. Raises EoraLabError on NaN or Inf, naming the layer."""
        v = v.reshape(-1, v.shape[-1]).float()  # (tokens, features)
        if not all_finite(v):
            raise EoraLabError(f"{self.name}: NaN or Inf in its {self.of} after {self.tokens} tokens")
        if len(v):
            self._add(v)
            self.tokens += len(v)

    def _add(self, v: Float[Tensor, "tokens features"]) -> None:
        rows = v.T.contiguous()  # parts of these are plain matrices, which are multiplied up to three times as fast
        for start, panel in zip(range(0, self.features, PANEL), self.sums(), strict=False):
            panel += rows[start : start + PANEL] @ rows[start:].T

    def merge(self: M, other: M) -> M:
        """Statistics of both token sets together."""
        merged = type(self)(self.features, self.device, self.name)
        for total, mine, theirs in zip(merged.sums(), self.sums(), other.sums(), strict=True):
            torch.add(mine, theirs, out=total)
        merged.tokens = self.tokens + other.tokens
        kept_apart = [s.held_out for s in (self, other) if s.held_out]
        merged.held_out = kept_apart[0].merge(kept_apart[1]) if len(kept_apart) == 2 else next(iter(kept_apart), None)
        return merged

    def to(self: M, device: torch.device | str) -> M:
        """These statistics themselves, moved to a device."""
        parts: list[Moments] = [self, self.held_out] if self.held_out else [self]
        for part in parts:
            for key, mean in part.means().items():
                setattr(part, key, mean.to(device))
        return self

    def save(self, path: Path | str) -> None:
        """Write to a safetensors file."""
        tensors = self.means()
        metadata = {"of": self.of, "tokens": str(self.tokens), "pooled_tokens": str(self.pooled_tokens)}
        metadata["name"] = self.name
        if self.held_out:
            tensors |= {f"held_out.{key}": mean for key, mean in self.held_out.means().items()}
            metadata["held_out.tokens"] = str(self.held_out.tokens)
        write_safetensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls: type[M], path: Path | str) -> M:
        """Read what `save` wrote. Raises EoraLabError when the file is missing or is something else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if (of := metadata.get("of", "input")) != cls.of:  # older files do not say
                    raise EoraLabError(f"{path} holds statistics of a layer's {of}, not of its {cls.of}")

                def read(prefix: str) -> M:
                    statistics = cls(0, name=metadata["name"])
                    statistics.tokens = int(metadata[f"{prefix}tokens"])
                    for key in statistics.means():
                        setattr(statistics, key, file.get_tensor(prefix + key))
                    return statistics

                statistics = read("")
                statistics.pooled_tokens = float(metadata.get("pooled_tokens", 0))
                if "held_out.tokens" in metadata:
                    statistics.held_out = read("held_out.")
        except (OSError, KeyError, SafetensorError) as error:
            raise EoraLabError(f"{path}: not a statistics file ({error})") from error
        return statistics


def check_second_moment(second_moment: Shaped[Tensor, "..."]) -> None:
    """Raise EoraLabError unless it is a finite, symmetric square matrix."""
    if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise EoraLabError(f"the second moment must be a square matrix, not {tuple(second_moment.shape)}")
    if not all_finite(second_moment):
        raise EoraLabError("the second moment has NaN or Inf entries")
    if not torch.allclose(second_moment, second_moment.T, rtol=0, atol=1e-4 * float(second_moment.abs().max())):
        raise EoraLabError("the second moment is not symmetric")


def all_finite(matrix: Shaped[Tensor, "..."]) -> bool:
    """Whether there is no NaN and no Inf. A finite sum, which takes one pass and no memory, settles it."""
    return bool(torch.isfinite(matrix.sum()) or torch.isfinite(matrix).all())
