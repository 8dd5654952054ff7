"""Round to nearest: every weight to its group's grid, without looking at the data."""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compress.format_grids import INTEGER, choose
from eora_lab.compress.storage import Compressed


@torch.no_grad()
def rtn(
    weight: Float[Tensor, "out in"], statistics: InputStatistics | None, *, grid: str = INTEGER, **settings
) -> Compressed:
    """Quantise W to the nearest point of a grid. `statistics` is not used.

    grid: "integer", or a name of `GRIDS`. settings: of `Grid`.
    """
    weight = weight.float()
    chosen = choose(weight, grid, **settings)
    return chosen.round(weight, *chosen.fit(weight))
