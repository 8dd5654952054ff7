"""EoRA (arXiv 2410.21271) in its inverse-free form: principal components of the output error."""

from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.lowrank import LowRank
from eora_lab.compensate.projection import principal_errors


def eora(residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int) -> LowRank:
    """B = U, the top eigenvectors of R S Rᵀ; A = Uᵀ R. The optimum of E|(R - B A) x|².

    The same optimum as the paper's steps, [R Q Λ^½]_r Λ^-½ Qᵀ with S = Q Λ Qᵀ (see `eora_paper`), and as QERA-exact,
    [R S^½]_r S^-½ (Zhang et al., arXiv 2410.06040), without an inverse.
    """
    return principal_errors(residual, statistics, rank)
