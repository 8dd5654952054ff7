"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, each column's error moved to those still open."""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.compress.grid import ScaleDtype, ZeroPoint, check_grid, min_max_grid
from eora_lab.compress.weight import CompressedWeight, zero_points
from eora_lab.errors import EoraLabError
from eora_lab.statistics import InputStatistics

BLOCK = 32  # columns between two updates of the rest; a matter of speed only


@torch.no_grad()
def gptq(
    weight: Float[Tensor, "out in"],
    statistics: InputStatistics,
    *,
    bits: int,
    group_size: int = 64,
    sym: bool = False,
    zero_point: ZeroPoint = "float",
    scale_dtype: ScaleDtype = "float32",
    damp_percent: float = 0.01,
) -> CompressedWeight:
    """Minimise tr((W - W^) S (W - W^)ᵀ) greedily over columns, with the Hessian S (the factor 2 cancels).

    Columns with the largest E[x²] come first (act-order); groups keep their channels, and their grids are those of the
    original weights (static groups), so that the result is stored like any other.
    damp_percent: share of S's mean diagonal that is added to the diagonal before it is factorised.
    """
    in_features = weight.shape[1]
    group_size = check_grid(in_features, bits, group_size)
    power = statistics.second_moment.diagonal()
    weight = weight.float().masked_fill(power == 0, 0)  # dead input channels
    scales, offsets = min_max_grid(weight, bits, group_size, sym, zero_point, scale_dtype)
    scale, zero = scales.float().T.contiguous(), zero_points(scales, offsets).T.contiguous()  # (groups, out)
    order = power.argsort(descending=True, stable=True)
    group = (order // group_size).tolist()
    steps = error_feedback(statistics.second_moment[order][:, order], damp_percent)  # unit upper triangular, (in, in)
    columns = weight.T[order].clone()  # (in, out): a column of W is a contiguous row
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for start in range(0, in_features, BLOCK):
        stop = min(start + BLOCK, in_features)
        for i in range(start, stop):
            column, code, error, g = columns[i], codes[i], errors[i], group[i]  # (out,) each
            torch.addcdiv(zero[g], column, scale[g], out=code).round_().clamp_(0, 2**bits - 1)
            torch.addcmul(column, code - zero[g], scale[g], value=-1, out=error)
            columns[i + 1 : stop].addr_(steps[i, i + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(steps[start:stop, stop:].T, errors[start:stop], alpha=-1)
    in_place = torch.empty_like(codes, dtype=torch.uint8)
    in_place[order] = codes.to(torch.uint8)
    return CompressedWeight(in_place.T.contiguous(), scales, offsets, bits)


def error_feedback(second_moment: Float[Tensor, "in in"], damp_percent: float) -> Float[Tensor, "in in"]:
    """Row i: what a unit error in column i moves into each later column while the columns before it stay fixed.

    These are the rows of the upper Cholesky factor U of H^-1 (step 3 of the paper), each over its diagonal entry. With
    H = V Vᵀ and V upper triangular, U = V^-1, so H itself is never inverted. The damping grows by 1 % until the
    factorisation succeeds.
    """
    hessian = second_moment.double().flip(0, 1)  # the Cholesky factor of the reversed matrix, reversed, is V
    diagonal = hessian.diagonal()
    dead = (diagonal == 0).double()
    for step in range(100):
        damped = hessian + torch.diag((damp_percent + 0.01 * step) * diagonal.mean() + dead)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            V = lower.flip(0, 1)
            U = torch.linalg.solve_triangular(V, torch.eye(len(V), dtype=V.dtype, device=V.device), upper=True)
            return (U / U.diagonal()[:, None]).float()
    raise EoraLabError("the second moment is too far from positive semi-definite for GPTQ")
