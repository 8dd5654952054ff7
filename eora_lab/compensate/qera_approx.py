"""QERA-approx (Zhang et al., arXiv 2410.06040): the optimum if input channels were uncorrelated."""

from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.lowrank import LowRank
from eora_lab.compensate.projection import principal_errors


def qera_approx(residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int) -> LowRank:
    """SVD of R diag(s) with s = sqrt(E[x²]), then A divided by s. Metric diag(S)."""
    return principal_errors(residual, statistics.power, rank)
