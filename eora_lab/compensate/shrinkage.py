"""Against overfitting to few tokens: mix S with the identity, and damp F, as much as held-out tokens ask for."""

from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compensate import LowRank, solve
from eora_lab.errors import EoraLabError

AMOUNTS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def shrunk(statistics: InputStatistics, amount: float) -> InputStatistics:
    """Statistics with (1 - amount) S + amount (tr S / in) I, which keeps the trace (Ledoit and Wolf 2004)."""
    S = statistics.second_moment
    other = InputStatistics(statistics.in_features, S.device, statistics.name)
    other.second_moment = (1 - amount) * S
    other.second_moment.diagonal().add_(amount * S.diagonal().mean())
    other.mean_abs, other.tokens = statistics.mean_abs, statistics.tokens
    return other


def solve_shrunk(
    method: str,
    residual: Float[Tensor, "out in"],
    statistics: InputStatistics,
    rank: int,
    outputs: OutputStatistics | None = None,
) -> tuple[LowRank, float]:
    """The answer whose loss on the held-out tokens is the lowest of all AMOUNTS, and its amount.

    outputs: where a method needs them. The loss is then tr(F D S Dᵀ) of held-out F and S, and the best of DAMPINGS is
             chosen first.
    Raises EoraLabError when no tokens were held out.
    """
    held_out, gradients = statistics.held_out, outputs and outputs.held_out
    if held_out is None or (outputs and gradients is None):
        raise EoraLabError(
            "shrinkage is chosen on held-out tokens: hold out a share of the calibration (held_out=0.25)"
        )
    S = held_out.second_moment

    def left(answer: LowRank) -> float:
        error = residual - answer.dense()
        return gradients.cost(error, S) if gradients else output_energy(error, S)

    if outputs:
        choices = [outputs.damped(damping) for damping in DAMPINGS]
        outputs = min(choices, key=lambda one: left(solve(method, residual, statistics, rank, one)))
    answers = {
        amount: solve(method, residual, shrunk(statistics, amount) if amount else statistics, rank, outputs)
        for amount in AMOUNTS
    }
    best = min(answers, key=lambda amount: left(answers[amount]))
    return answers[best], best
