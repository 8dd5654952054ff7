"""Plain SVD of the weight error: LoRC of ZeroQuant-V2 (arXiv 2303.08302)."""

from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.lowrank import LowRank
from eora_lab.compensate.projection import principal_errors


def svd(residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int) -> LowRank:
    """Every input channel counts the same: minimise ||R - B A||². Metric I."""
    return principal_errors(residual, residual.new_ones(residual.shape[1]), rank)
