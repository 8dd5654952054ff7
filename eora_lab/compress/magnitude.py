"""Magnitude pruning: the smallest weights go, without looking at the data."""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compress.grid import Grid
from eora_lab.compress.prune import store
from eora_lab.compress.sparsity import Sparsity
from eora_lab.compress.storage import Compressed


@torch.no_grad()
def magnitude(
    weight: Float[Tensor, "out in"], statistics: InputStatistics | None, *, sparsity: str, **grid
) -> Compressed:
    """Keep the largest |W|: in every m inputs, or in the whole layer. `statistics` is not used.

    sparsity: see `Sparsity`. grid: the fields of `Grid`, for the weights that are kept.
    """
    pattern, weight = Sparsity.parse(sparsity), weight.float()
    pattern.check(weight.shape[1])
    return store(weight, pattern.keep(weight.abs()), Grid(**grid))
