"""The uniform grid that quantisers round to, one per group of input channels."""

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eora_lab.compress.weight import zero_points
from eora_lab.errors import EoraLabError

ZeroPoint = Literal["float", "integer"]
ScaleDtype = Literal["float32", "float16"]
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16; keeps an all-zero group from dividing by zero


def check_grid(in_features: int, bits: int, group_size: int) -> int:
    """Return the group size in channels (-1 means one group per row). Raises EoraLabError on an unusable grid."""
    if not 2 <= bits <= 8:
        raise EoraLabError(f"bits must be between 2 and 8, not {bits}")
    if group_size == -1:
        return in_features
    if group_size < 1 or in_features % group_size:
        divisors = [g for g in (32, 64, 96, 128, 192, 256) if in_features % g == 0]
        raise EoraLabError(
            f"group size {group_size} does not divide {in_features} input features; use one of {divisors} or -1"
        )
    return group_size


def min_max_grid(
    weight: Float[Tensor, "out in"],
    bits: int,
    group_size: int,
    sym: bool,
    zero_point: ZeroPoint,
    scale_dtype: ScaleDtype,
) -> tuple[Float[Tensor, "out groups"], UInt8[Tensor, "out groups"] | Float[Tensor, "out groups"]]:
    """Scales and offsets (see `CompressedWeight`) that span each group's range, and zero.

    Asymmetric: scale = (max - min) / (2^bits - 1), and code 0 stands for min. zero_point "float" stores min, so that
        min and max stay exact; "integer" stores round(-min / scale), so that a weight of 0 stays 0.
    Symmetric: scale = 2 max|w| / (2^bits - 1), zero point 2^(bits - 1), as in GPTQ's code (arXiv 2210.17323).
    """
    groups = weight.unflatten(1, (-1, group_size))  # (out, groups, group_size)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)  # a grid far from zero would lose precision
    levels, dtype = 2**bits - 1, getattr(torch, scale_dtype)
    if zero_point == "float":
        low = low.to(dtype).float()  # as it is stored, so that the scale still ends at max
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / levels).clamp_min(SMALLEST_SCALE).to(dtype)
    if not torch.isfinite(scales).all():
        raise EoraLabError(f"weights are not finite, or too large for {scale_dtype} scales")
    if sym:
        return scales, torch.full_like(low, 2 ** (bits - 1), dtype=torch.uint8)
    if zero_point == "float":
        return scales, low.to(dtype)
    return scales, (-low / scales.float()).round().clamp(0, levels).to(torch.uint8)


def round_to_grid(
    weight: Float[Tensor, "out in"],
    scales: Float[Tensor, "out groups"],
    offsets: UInt8[Tensor, "out groups"] | Float[Tensor, "out groups"],
    bits: int,
) -> UInt8[Tensor, "out in"]:
    """The nearest code of every weight."""
    groups = weight.unflatten(1, (scales.shape[1], -1))
    codes = (groups / scales.float()[..., None] + zero_points(scales, offsets)[..., None]).round()
    return codes.clamp(0, 2**bits - 1).to(torch.uint8).flatten(1)
