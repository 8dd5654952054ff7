"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column, and quantise what is kept on the way."""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compress.feedback import column_sweep, inverse_factor
from eora_lab.compress.grid import Grid, check_grid
from eora_lab.compress.grid_weight import GridWeight, zero_points
from eora_lab.compress.prune import store
from eora_lab.compress.sparsity import Sparsity
from eora_lab.compress.storage import Compressed

SPAN = 128  # columns whose masks are chosen at the same time where sparsity is unstructured


@torch.no_grad()
def sparsegpt(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    *,
    sparsity: str,
    damp_percent: float = 0.01,
    **settings,
) -> Compressed:
    """Minimise tr((W - W^) S (W - W^)ᵀ) greedily over columns, with the weights of lowest w² / U_ii² pruned.

    The mask of every m columns (n:m), or of every SPAN, is chosen from the weights as they stand when the sweep
    reaches them. With fewer than 16 bits the kept weights are rounded in the same sweep (section 3.5); the grid of a
    group is fitted, when it is reached, to the weights that would be kept as they stand.
    sparsity: see `Sparsity`. damp_percent: see `inverse_factor`. settings: of `Grid`.
    """
    grid, pattern, in_features = Grid(**settings), Sparsity.parse(sparsity), weight.shape[1]
    pattern.check(in_features)
    power = statistics.second_moment.diagonal()
    columns = weight.float().masked_fill(power == 0, 0).T.contiguous()  # (in, out), dead input channels zero
    factor = inverse_factor(statistics.second_moment, damp_percent)
    cost = factor.diagonal() ** -2  # of an error of 1 in every column, once the later ones have made up for it
    mask = torch.zeros_like(columns, dtype=torch.bool)
    span = pattern.m or SPAN

    def keep(start: int, width: int) -> Tensor:
        part = slice(start, start + width)
        return pattern.keep((columns[part].square() * cost[part, None]).T).T

    def prune(i: int) -> Float[Tensor, " out"]:
        if i % span == 0:
            mask[i : i + span] = keep(i, span)
        return columns[i] * mask[i]

    if grid.bits == 16:
        column_sweep(columns, factor, prune, span)
        return store(columns.T.contiguous(), mask.T.contiguous(), grid)
    group_size = check_grid(in_features, grid.bits, grid.group_size)
    codes = torch.empty_like(columns)
    grids: list[tuple[Tensor, ...]] = []

    def prune_and_round(i: int) -> Float[Tensor, " out"]:
        if i % group_size == 0:
            group = slice(i, i + group_size)
            grids.append(grid.fit(columns[group].T, power[group], keep(i, group_size).T))
        scales, offsets = grids[-1]
        scale, zero = scales[:, 0].float(), zero_points(scales, offsets)[:, 0]
        kept = prune(i)
        torch.addcdiv(zero, kept, scale, out=codes[i]).round_().clamp_(0, 2**grid.bits - 1).mul_(mask[i])
        return (codes[i] - zero) * scale * mask[i]

    column_sweep(columns, factor, prune_and_round, span, group_size)
    scales, offsets = (torch.cat(parts, dim=1) for parts in zip(*grids, strict=True))
    codes = codes.to(torch.uint8).T.contiguous()
    return GridWeight(codes, scales, offsets, grid.bits, mask.T.contiguous(), group_size)
