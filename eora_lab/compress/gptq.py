"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, each column's error moved to those still open."""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compress.feedback import column_sweep, inverse_factor
from eora_lab.compress.format_grids import INTEGER, choose
from eora_lab.compress.grid import check_grid
from eora_lab.compress.storage import Compressed


@torch.no_grad()
def gptq(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    *,
    grid: str = INTEGER,
    desc_act: bool = True,
    damp_percent: float = 0.01,
    **settings,
) -> Compressed:
    """Minimise tr((W - W^) S (W - W^)ᵀ) greedily over columns.

    grid: "integer", or a name of `GRIDS`.
    desc_act: columns with the largest E[x²] come first (act-order). Groups keep their channels, and their grids are
        those of the original weights (static groups), so that the result is stored like any other. Without it,
        columns come as they are, and a group's grid is fitted to its weights as they stand when it is reached.
    damp_percent: see `inverse_factor`. settings: of `Grid`; its search weighs errors by E[x²].
    """
    power = statistics.power
    weight = weight.float().masked_fill(power == 0, 0)  # dead input channels
    chosen, in_features = choose(weight, grid, **settings), weight.shape[1]
    group_size = check_grid(in_features, chosen.bits, chosen.group_size)
    order = power.argsort(descending=True, stable=True) if desc_act else torch.arange(in_features, device=power.device)
    group = (order // group_size).tolist()
    factor = inverse_factor(statistics.second_moment, damp_percent, order)
    columns = weight.T[order].clone()  # (in, out)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    fitted = [part.T.contiguous() for part in chosen.fit(weight, power)]  # (groups, out)
    ready = chosen.ready(*fitted)
    grids = list(zip(*(part.unbind() for part in ready), strict=True))  # of every group, which follow what it becomes
    rows, code_rows = columns.unbind(), codes.unbind()

    def compress(i: int) -> Float[Tensor, " out"]:
        g = group[i]
        if not desc_act and i % group_size == 0:
            for part, new in zip(
                fitted, chosen.fit(columns[i : i + group_size].T, power[i : i + group_size]), strict=True
            ):
                part[g] = new[:, 0]
            for part, new in zip(ready, chosen.ready(*(part[g : g + 1] for part in fitted)), strict=True):
                part[g] = new[0]
        found = chosen.nearest(rows[i], *grids[g])
        code_rows[i].copy_(found)
        return chosen.points(found, *grids[g])

    column_sweep(columns, factor, compress, *([] if desc_act else [group_size]))
    in_place = torch.empty_like(codes)
    in_place[order] = codes
    return chosen.store(in_place.T.contiguous(), *(part.T.contiguous() for part in fitted))
