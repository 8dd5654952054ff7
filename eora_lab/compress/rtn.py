"""Round to nearest: every weight to its group's grid, without looking at the data."""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compress.grid import Grid
from eora_lab.compress.grid_weight import GridWeight


@torch.no_grad()
def rtn(weight: Float[Tensor, "out in"], statistics: InputStatistics | None, **settings) -> GridWeight:
    """Quantise W to the nearest point of a grid. settings: of `Grid`. `statistics` is not used."""
    grid, weight = Grid(**settings), weight.float()
    return grid.round(weight, *grid.fit(weight))
