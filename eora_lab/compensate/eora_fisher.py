"""EoRA with both sides of the weight: an output error counts as what it costs the model, to second order."""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.lowrank import LowRank
from eora_lab.compensate.projection import principal_errors


def eora_fisher(
    residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int, outputs: OutputStatistics
) -> LowRank:
    """Minimise tr(F (R - B A) S (R - B A)ᵀ), with F = L Lᵀ damped (`OutputStatistics.root`).

    That is EoRA of Lᵀ R, whose B is taken back: B = L^-T U, A = Uᵀ Lᵀ R, U the top-r eigenvectors of Lᵀ R S Rᵀ L.
    Any other root of F gives the same B A. With F = I it is `eora`.
    Half of an entry of the spectrum is the loss in nats a token that the rank removes, to second order: spectra of
    different layers are in one currency. It is 0 where no gradient was seen; the answer is then that of `eora`.
    F x S is the Kronecker-factored Fisher information (Martens and Grosse, arXiv 1503.05671).
    """
    answer = principal_errors(outputs.whitened(residual).to(residual.dtype), statistics, rank)
    spectrum = answer.spectrum if outputs.seen else torch.zeros_like(answer.spectrum)
    return LowRank(A=answer.A, B=outputs.unwhitened(answer.B).to(answer.B.dtype), spectrum=spectrum)
