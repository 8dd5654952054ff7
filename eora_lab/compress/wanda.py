"""Wanda (Sun et al., arXiv 2306.11695): the weights go that move the output least, each taken alone."""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compress.grid import Grid
from eora_lab.compress.prune import store
from eora_lab.compress.sparsity import Sparsity
from eora_lab.compress.storage import Compressed


@torch.no_grad()
def wanda(weight: Float[Tensor, "out in"], statistics: InputStatistics, *, sparsity: str, **grid) -> Compressed:
    """Keep the largest |W_oi| sqrt(E[x_i²]) (equation 1): in every m inputs, or in every output row.

    sparsity: see `Sparsity`. grid: the fields of `Grid`, for the weights that are kept.
    """
    pattern, weight = Sparsity.parse(sparsity), weight.float()
    pattern.check(weight.shape[1])
    score = weight.abs() * statistics.power.sqrt()
    return store(weight, pattern.keep(score, by_row=True), Grid(**grid))
