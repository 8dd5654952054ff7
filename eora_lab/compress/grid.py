"""The uniform grid that quantisers round to, one per group of input channels."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from eora_lab.compress.grid_weight import GridWeight, in_groups, zero_points
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


@dataclass(frozen=True)
class Grid:
    """Which grid the weights of a group get.

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

    def fit(
        self,
        weight: Float[Tensor, "out in"],
        importance: Float[Tensor, " in"] | None = None,
        mask: Bool[Tensor, "out in"] | None = None,
    ) -> tuple[Float[Tensor, "out groups"], Offsets]:
        """Scales and offsets (see `GridWeight`) for the weights of every group, and for zero.

        importance: what a unit of squared error costs in every channel; None: the same.
        mask: the weights that are kept; the others do not count.
        Raises EoraLabError on weights that the scales cannot hold.
        """
        group_size = check_grid(weight.shape[1], self.bits, self.group_size)
        counts = torch.ones_like(weight) if mask is None else mask.float()
        groups = in_groups(weight * counts, group_size)  # (out, groups, group_size)
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)  # far from zero it would lose precision
        scales, offsets = self.span(low, high)
        if not self.mse:
            return scales, offsets
        counts = in_groups(counts if importance is None else counts * importance, group_size)
        least = torch.full_like(low, torch.inf)
        for shrink in SHRINKS:
            tried = self.span(low * shrink, high * shrink)
            scale, zero = tried[0].float()[..., None], zero_points(*tried)[..., None]
            rounded = torch.addcdiv(zero, groups, scale).round_().clamp_(0, 2**self.bits - 1).sub_(zero).mul_(scale)
            error = rounded.sub_(groups).square_().mul_(counts).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            scales, offsets = torch.where(better, tried[0], scales), torch.where(better, tried[1], offsets)
        return scales, offsets

    def span(
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

    def round(
        self,
        weight: Float[Tensor, "out in"],
        scales: Float[Tensor, "out groups"],
        offsets: Offsets,
        mask: Bool[Tensor, "out in"] | None = None,
    ) -> GridWeight:
        """The nearest point of the grid for every weight that is kept."""
        group_size = check_grid(weight.shape[1], self.bits, self.group_size)
        codes = in_groups(weight, group_size) / scales.float()[..., None] + zero_points(scales, offsets)[..., None]
        codes = codes.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(1)[:, : weight.shape[1]]
        codes = codes.contiguous() if mask is None else codes * mask
        return GridWeight(codes, scales, offsets, self.bits, mask, group_size)
