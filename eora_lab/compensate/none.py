"""No compensation: the base that every method is measured against."""

from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.lowrank import LowRank


def none(residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int) -> LowRank:
    """Rank 0, whatever rank is asked for."""
    out_features, in_features = residual.shape
    return LowRank(
        residual.new_zeros(0, in_features), residual.new_zeros(out_features, 0), residual.new_zeros(0).double()
    )
