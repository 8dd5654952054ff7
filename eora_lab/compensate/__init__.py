"""Training-free low-rank compensation: one closed form a file, one interface for all."""

import inspect
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.moments import all_finite
from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.act_s import act_s, act_s_released
from eora_lab.compensate.eora import eora
from eora_lab.compensate.eora_fisher import eora_fisher
from eora_lab.compensate.eora_paper import eora_paper
from eora_lab.compensate.factors import StoredFactors, store_factors
from eora_lab.compensate.lowrank import LowRank
from eora_lab.compensate.lqer import lqer
from eora_lab.compensate.none import none
from eora_lab.compensate.projection import principal_errors
from eora_lab.compensate.qera_approx import qera_approx
from eora_lab.compensate.svd import svd
from eora_lab.errors import EoraLabError, unknown
from eora_lab.products import fast_products

SOLVERS: dict[str, Callable[..., LowRank]] = {
    "none": none,
    "svd": svd,
    "act_s": act_s,
    "act_s_released": act_s_released,
    "lqer": lqer,
    "qera_approx": qera_approx,
    "eora": eora,
    "eora_fisher": eora_fisher,
    "qera_exact": eora,  # another road to the same optimum
    "eora_paper": eora_paper,
}

__all__ = [
    "SOLVERS",
    "LowRank",
    "StoredFactors",
    "act_s",
    "act_s_released",
    "eora",
    "eora_fisher",
    "eora_paper",
    "lqer",
    "needs_outputs",
    "none",
    "principal_errors",
    "qera_approx",
    "solve",
    "store_factors",
    "svd",
]


def needs_outputs(method: str) -> bool:
    """Whether a method in SOLVERS names `outputs` in its signature: it is handed `OutputStatistics` as well."""
    return "outputs" in inspect.signature(SOLVERS[method]).parameters


@fast_products()
@torch.no_grad()
def solve(
    method: str,
    residual: Float[Tensor, "out in"],
    statistics: InputStatistics | Float[Tensor, "rows columns"],
    rank: int,
    outputs: OutputStatistics | Float[Tensor, "orows ocolumns"] | None = None,
) -> LowRank:
    """Compensate the residual R = W - W^ at the given rank.

    method:     a name in SOLVERS.
    statistics: of the layer's input, or a plain second moment E[x xᵀ] (in, in).
    outputs:    of the gradients at its output, or a plain second moment E[g gᵀ] (out, out): for methods that need them.
    Raises EoraLabError: unknown method, rank larger than the layer, sizes that do not match, NaN or Inf, no `outputs`
    where the method needs them.
    """
    if method not in SOLVERS:
        raise unknown("method", method, SOLVERS)
    if isinstance(statistics, Tensor):
        statistics = InputStatistics.from_second_moment(statistics)
    if isinstance(outputs, Tensor):
        outputs = OutputStatistics.from_second_moment(outputs)
    if residual.shape[1] != statistics.in_features:
        raise EoraLabError(f"a layer of {residual.shape[1]} inputs cannot use statistics of {statistics.in_features}")
    if method != "none" and not 0 <= rank <= min(residual.shape):
        raise EoraLabError(
            f"rank {rank} does not fit a layer of {tuple(residual.shape)}: at most {min(residual.shape)}"
        )
    if not all_finite(residual):
        raise EoraLabError("the residual has NaN or Inf entries")
    if not needs_outputs(method):
        return SOLVERS[method](residual, statistics, rank)
    if outputs is None:
        raise EoraLabError(
            f"{method} needs the gradients at the layer's output: measure them first (collect_output_statistics)"
        )
    if residual.shape[0] != outputs.out_features:
        raise EoraLabError(f"a layer of {residual.shape[0]} outputs cannot use statistics of {outputs.out_features}")
    return SOLVERS[method](residual, statistics, rank, outputs)
