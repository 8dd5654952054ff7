"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, each column's error moved to those still open."""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compress.feedback import column_sweep, inverse_factor
from eora_lab.compress.grid import Grid, check_grid
from eora_lab.compress.grid_weight import GridWeight, zero_points


@torch.no_grad()
def gptq(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    *,
    desc_act: bool = True,
    damp_percent: float = 0.01,
    **settings,
) -> GridWeight:
    """Minimise tr((W - W^) S (W - W^)ᵀ) greedily over columns.

    desc_act: columns with the largest E[x²] come first (act-order). Groups keep their channels, and their grids are
        those of the original weights (static groups), so that the result is stored like any other. Without it,
        columns come as they are, and a group's grid is fitted to its weights as they stand when it is reached.
    damp_percent: see `inverse_factor`. settings: of `Grid`; its search weighs errors by E[x²].
    """
    grid, in_features = Grid(**settings), weight.shape[1]
    group_size = check_grid(in_features, grid.bits, grid.group_size)
    power = statistics.power
    weight = weight.float().masked_fill(power == 0, 0)  # dead input channels
    order = power.argsort(descending=True, stable=True) if desc_act else torch.arange(in_features, device=power.device)
    group = (order // group_size).tolist()
    factor = inverse_factor(statistics.second_moment[order][:, order], damp_percent)
    columns = weight.T[order].clone()  # (in, out)
    codes = torch.empty_like(columns)
    scales, offsets = (part.T.contiguous() for part in grid.fit(weight, power))  # (groups, out)
    scale, zero = scales.float(), zero_points(scales, offsets)

    def compress(i: int) -> Float[Tensor, " out"]:
        g = group[i]
        if not desc_act and i % group_size == 0:
            fitted = grid.fit(columns[i : i + group_size].T, power[i : i + group_size])
            scales[g], offsets[g] = (part[:, 0] for part in fitted)
            scale[g], zero[g] = scales[g].float(), zero_points(scales[g : g + 1], offsets[g : g + 1])[0]
        torch.addcdiv(zero[g], columns[i], scale[g], out=codes[i]).round_().clamp_(0, 2**grid.bits - 1)
        return (codes[i] - zero[g]) * scale[g]

    column_sweep(columns, factor, compress, *([] if desc_act else [group_size]))
    in_place = torch.empty_like(codes, dtype=torch.uint8)
    in_place[order] = codes.to(torch.uint8)
    return GridWeight(
        in_place.T.contiguous(), scales.T.contiguous(), offsets.T.contiguous(), grid.bits, None, group_size
    )
