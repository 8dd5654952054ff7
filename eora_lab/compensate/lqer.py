"""LQER (Zhang et al., arXiv 2402.02446): SVD scaled by activation magnitudes."""

from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.lowrank import LowRank
from eora_lab.compensate.projection import principal_errors


def lqer(residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int) -> LowRank:
    """SVD of R diag(s) with s = a / sqrt(min(a) max(a)), a = E|x|, then A divided by s. Metric diag(s²).

    A channel that is never active does not set the minimum; the normalisation does not change the answer.
    """
    a = statistics.mean_abs.double()
    active = a[a > 0]
    scale = a / (active.min() * active.max()).sqrt() if len(active) else a
    return principal_errors(residual, scale.square(), rank)
