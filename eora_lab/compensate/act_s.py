"""Activation-scaled SVD: the Act-S baseline of the EoRA paper (arXiv 2410.21271)."""

from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.lowrank import LowRank
from eora_lab.compensate.projection import principal_errors


def act_s(residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int) -> LowRank:
    """SVD of R diag(s) with s = E|x|^½, then A divided by s. Metric diag(s²) = diag(E|x|)."""
    return principal_errors(residual, statistics.mean_abs, rank)


def act_s_released(residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int) -> LowRank:
    """As `act_s` with s = E|x|, as in the paper's released code. Metric diag(E|x|²)."""
    return principal_errors(residual, statistics.mean_abs.double().square(), rank)
