"""What a layer should aim at when its input is no longer that of the original model.

The output W x of the original is met best by W + W D S^-1 on x̂, the regression of W x on x̂, with D = E[(x - x̂) x̂ᵀ] and
S = E[x̂ x̂ᵀ] (QEP, arXiv 2504.09629; GPTAQ, arXiv 2504.02692, which says it of GPTQ). All of that step is too much: it is
fitted to few tokens, and what one layer makes good its neighbours would make good once more. How much of it holds is
measured on held-out tokens, where the best share has a closed form.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics

DAMPING = 0.01  # of the mean diagonal of S


def drift_step(
    weight: Float[Tensor, "out in"], statistics: InputStatistics, share: float = 1.0
) -> tuple[Float[Tensor, "out in"] | None, float]:
    """share α W D (S + λ I)^-1, to be added to W, float32, and share α; None and 0 where no drift was measured.

    α is in [0, 1], the least squares fit of W (x - x̂) on the held-out tokens: with K = W D (S + λ I)^-1 it is
    tr(K D_hᵀ Wᵀ) / tr(K S_h Kᵀ).
    """
    held_out = statistics.held_out
    if not share or statistics.drift is None or held_out is None or held_out.drift is None:
        return None, 0.0
    W, S = weight.double(), statistics.second_moment.double()
    damped = S + DAMPING * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype, device=S.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # S is zero: nothing came
        return None, 0.0
    K = torch.cholesky_solve((W @ statistics.drift.double()).T, factor).T
    met = ((W @ held_out.drift.double()) * K).sum()
    length = ((K @ held_out.second_moment.double()) * K).sum()
    strength = share * (met / length).clamp(0, 1).item() if length > 0 else 0.0
    return (strength * K).float() if strength else None, strength
