"""Round to nearest: every weight to its group's grid, without looking at the data."""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.compress.grid import ScaleDtype, ZeroPoint, check_grid, min_max_grid, round_to_grid
from eora_lab.compress.weight import CompressedWeight
from eora_lab.statistics import InputStatistics


@torch.no_grad()
def rtn(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics | None,
    *,
    bits: int,
    group_size: int = 64,
    sym: bool = False,
    zero_point: ZeroPoint = "float",
    scale_dtype: ScaleDtype = "float32",
) -> CompressedWeight:
    """Quantise W to the nearest point of a min-max grid. `statistics` is not used."""
    group_size = check_grid(weight.shape[1], bits, group_size)
    weight = weight.float()
    scales, offsets = min_max_grid(weight, bits, group_size, sym, zero_point, scale_dtype)
    return CompressedWeight(round_to_grid(weight, scales, offsets, bits), scales, offsets, bits)
