"""Against overfitting to few tokens: mix S with a multiple of the identity, as much as held-out tokens ask for."""

import math

from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compensate import LowRank, solve
from eora_lab.errors import EoraLabError

AMOUNTS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)


def shrunk(statistics: InputStatistics, amount: float) -> InputStatistics:
    """Statistics with (1 - amount) S + amount (tr S / in) I, which keeps the trace (Ledoit and Wolf 2004)."""
    S = statistics.second_moment
    other = InputStatistics(statistics.in_features, S.device, statistics.name)
    other.second_moment = (1 - amount) * S
    other.second_moment.diagonal().add_(amount * S.diagonal().mean())
    other.mean_abs, other.tokens = statistics.mean_abs, statistics.tokens
    return other


def solve_shrunk(
    method: str, residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int
) -> tuple[LowRank, float]:
    """The answer whose loss on the held-out tokens is the lowest of all AMOUNTS, and its amount.

    Raises EoraLabError when no tokens were held out.
    """
    if statistics.held_out is None:
        raise EoraLabError(
            "shrinkage is chosen on held-out tokens: hold out a share of the calibration (held_out=0.25)"
        )
    held_out, best = statistics.held_out.second_moment, math.inf
    for amount in AMOUNTS:
        answer = solve(method, residual, shrunk(statistics, amount) if amount else statistics, rank)
        left = output_energy(residual - answer.dense(), held_out)
        if left < best or amount == AMOUNTS[0]:
            best, chosen = left, (answer, amount)
    return chosen
