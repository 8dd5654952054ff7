"""What pruners share: the kept weights stored as they are, or rounded to a grid that is fitted to them."""

from jaxtyping import Bool, Float
from torch import Tensor

from eora_lab.compress.grid import Grid
from eora_lab.compress.sparse_weight import SparseWeight
from eora_lab.compress.storage import Compressed
from eora_lab.errors import EoraLabError


def store(weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], grid: Grid) -> Compressed:
    """Keep the weights of the mask: in float16 where the grid has 16 bits, else each at the nearest point of the grid.

    Raises EoraLabError on weights beyond float16.
    """
    if grid.bits != 16:
        return grid.round(weight, *grid.fit(weight, None, mask), mask=mask)
    values = (weight * mask).half()
    if not values.isfinite().all():
        raise EoraLabError("weights are not finite, or too large for float16")
    return SparseWeight(values, mask)
