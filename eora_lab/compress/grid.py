"""The grids that quantisers round to, one per group of input channels; those with levels at equal distances."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from eora_lab.compress.grid_weight import GridWeight, in_groups, zero_points
from eora_lab.compress.storage import Compressed
from eora_lab.errors import EoraLabError

ZeroPoint = Literal["float", "integer"]
ScaleDtype = Literal["float32", "float16"]
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16; keeps an all-zero group from dividing by zero
SHRINKS = [1 - step / 40 for step in range(26)]  # shares of the range that the search tries, down to 0.375

Offsets = UInt8[Tensor, "out groups"] | Float[Tensor, "out groups"]


def check_grid(in_features: int, bits: int, group_size: int) -> int:
    """Return the group size in channels (-1 means one group per row; the last group of a row may be shorter).

    Raises EoraLabError on an unusable grid.
    """
    if not 2 <= bits <= 8:
        raise EoraLabError(f"bits must be between 2 and 8, not {bits}")
    if group_size != -1 and group_size < 1:
        raise EoraLabError(f"group size must be 1 or more, or -1 for one group per output row, not {group_size}")
    return in_features if group_size == -1 else min(group_size, in_features)


class RoundingGrid(ABC):
    """What rounds the weights of every group to a grid of the group's own.

    A grid is fitted to some weights, and the fit is a tuple of float tensors (out, groups). `ready` makes of it what
    `nearest` and `points` compute with, element by element, so that any rows, columns or groups can be taken of it.

    shrinks: shares of the range that the search for the least squared error tries (mse).
    """

    bits: int
    group_size: int
    mse: bool
    shrinks: Sequence[float] = SHRINKS

    @abstractmethod
    def ends(self, groups: Float[Tensor, "out groups group_size"]) -> tuple[Float[Tensor, "out groups"], ...]:
        """What the range of every group follows from."""

    @abstractmethod
    def span(self, *ends: Float[Tensor, "out groups"]) -> tuple[Shaped[Tensor, "out groups"], ...]:
        """The grid of a range. Raises EoraLabError on weights that its scales cannot hold."""

    @abstractmethod
    def ready(self, *fitted: Shaped[Tensor, "*groups"]) -> tuple[Float[Tensor, "*groups"], ...]:
        """What `nearest` and `points` take."""

    @abstractmethod
    def nearest(self, weight: Float[Tensor, "*weight"], *ready: Float[Tensor, "*groups"]) -> Shaped[Tensor, "*weight"]:
        """The codes of the points that are nearest."""

    @abstractmethod
    def points(self, codes: Shaped[Tensor, "*weight"], *ready: Float[Tensor, "*groups"]) -> Float[Tensor, "*weight"]:
        """What codes stand for."""

    @abstractmethod
    def store(
        self,
        codes: Shaped[Tensor, "out in"],
        *fitted: Shaped[Tensor, "out groups"],
        mask: Bool[Tensor, "out in"] | None = None,
    ) -> Compressed:
        """Codes with their grids. mask: the weights that are kept; None: all."""

    def fit(
        self,
        weight: Float[Tensor, "out in"],
        importance: Float[Tensor, " in"] | None = None,
        mask: Bool[Tensor, "out in"] | None = None,
    ) -> tuple[Shaped[Tensor, "out groups"], ...]:
        """The grids for the weights of every group, and for zero.

        importance: what a unit of squared error costs in every channel; None: the same.
        mask: the weights that are kept; the others do not count.
        Raises EoraLabError on weights that the scales cannot hold.
        """
        group_size = check_grid(weight.shape[1], self.bits, self.group_size)
        counts = torch.ones_like(weight) if mask is None else mask.float()
        groups = in_groups(weight * counts, group_size)  # (out, groups, group_size)
        ends = self.ends(groups)
        fitted = self.span(*ends)
        if not self.mse:
            return fitted
        counts = in_groups(counts if importance is None else counts * importance, group_size)
        least = torch.full_like(ends[0], torch.inf)
        for shrink in self.shrinks:
            tried = self.span(*(end * shrink for end in ends))
            ready = [part[..., None] for part in self.ready(*tried)]
            rounded = self.points(self.nearest(groups, *ready), *ready)
            error = rounded.sub_(groups).square_().mul_(counts).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            fitted = tuple(torch.where(better, new, old) for new, old in zip(tried, fitted, strict=True))
        return fitted

    def round(
        self,
        weight: Float[Tensor, "out in"],
        *fitted: Shaped[Tensor, "out groups"],
        mask: Bool[Tensor, "out in"] | None = None,
    ) -> Compressed:
        """The nearest point of the grid for every weight that is kept."""
        group_size = check_grid(weight.shape[1], self.bits, self.group_size)
        ready = [part[..., None] for part in self.ready(*fitted)]
        codes = self.nearest(in_groups(weight, group_size), *ready).flatten(1)[:, : weight.shape[1]]
        return self.store(codes, *fitted, mask=mask)


@dataclass(frozen=True)
class Grid(RoundingGrid):
    """Which grid with equal distances the weights of a group get. It is fitted as (scales, offsets) of a `GridWeight`.

    bits:        2 to 8. Pruners also take 16: the kept weights stay as they are.
    group_size:  input channels that share a grid; -1: one grid per output row.
    sym:         scale = 2 max|w| / (2^bits - 1), zero point 2^(bits - 1), as in GPTQ's code (arXiv 2210.17323).
                 Else scale = (max - min) / (2^bits - 1), and code 0 stands for min.
    zero_point:  of asymmetric grids. "float" stores min, so that min and max stay exact; "integer" stores
                 round(-min / scale), so that a weight of 0 stays 0.
    scale_dtype: float32 or float16, of scales and float offsets.
    mse:         shrink the range of every group as far as its squared error falls, the weights weighed as the
                 compressor says.
    """

    bits: int
    group_size: int = 64
    sym: bool = False
    zero_point: ZeroPoint = "float"
    scale_dtype: ScaleDtype = "float32"
    mse: bool = False

    def ends(
        self, groups: Float[Tensor, "out groups group_size"]
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """The smallest and the largest weight; far from zero the grid would lose precision."""
        return groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)

    def span(  # type: ignore[override]
        self, low: Float[Tensor, "out groups"], high: Float[Tensor, "out groups"]
    ) -> tuple[Float[Tensor, "out groups"], Offsets]:
        """The grid from low to high, as it is stored."""
        levels, dtype = 2**self.bits - 1, getattr(torch, self.scale_dtype)
        if self.zero_point == "float":
            low = low.to(dtype).float()  # as it is stored, so that the scale still ends at max
        if self.sym:
            high = torch.maximum(high, -low)
            low = -high
        scales = ((high - low) / levels).clamp_min(SMALLEST_SCALE).to(dtype)
        if not torch.isfinite(scales).all():
            raise EoraLabError(f"weights are not finite, or too large for {self.scale_dtype} scales")
        if self.sym:
            return scales, torch.full_like(low, 2 ** (self.bits - 1), dtype=torch.uint8)
        if self.zero_point == "float":
            return scales, low.to(dtype)
        return scales, (-low / scales.float()).round().clamp(0, levels).to(torch.uint8)

    def ready(  # type: ignore[override]
        self, scales: Float[Tensor, "*groups"], offsets: Shaped[Tensor, "*groups"]
    ) -> tuple[Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
        """Scales and zero points."""
        return scales.float(), zero_points(scales, offsets)

    def nearest(  # type: ignore[override]
        self, weight: Float[Tensor, "*weight"], scale: Float[Tensor, "*groups"], zero: Float[Tensor, "*groups"]
    ) -> Float[Tensor, "*weight"]:
        """The codes of the points that are nearest, whole numbers."""
        return torch.addcdiv(zero, weight, scale).round_().clamp_(0, 2**self.bits - 1)

    def points(  # type: ignore[override]
        self, codes: Float[Tensor, "*weight"], scale: Float[Tensor, "*groups"], zero: Float[Tensor, "*groups"]
    ) -> Float[Tensor, "*weight"]:
        """What codes stand for."""
        return (codes - zero).mul_(scale)

    def store(  # type: ignore[override]
        self,
        codes: Shaped[Tensor, "out in"],
        scales: Float[Tensor, "out groups"],
        offsets: Offsets,
        mask: Bool[Tensor, "out in"] | None = None,
    ) -> GridWeight:
        """Codes with their grids; codes of pruned weights are 0."""
        codes = codes.to(torch.uint8)
        group_size = check_grid(codes.shape[1], self.bits, self.group_size)
        codes = codes.contiguous() if mask is None else codes * mask
        return GridWeight(codes, scales, offsets, self.bits, mask, group_size)
