"""Linears of a model: compressed, compensated, put in place, and what the report says of them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.calibrate.statistics import InputStatistics, energies_with_path, output_energy
from eora_lab.compensate import SOLVERS, LowRank, needs_outputs
from eora_lab.compensate.drift import drift_step
from eora_lab.compensate.eora import eora
from eora_lab.compensate.eora_fisher import eora_fisher
from eora_lab.compress import residual
from eora_lab.environment import step as timing
from eora_lab.errors import naming
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.model.structure import linear_at
from eora_lab.run.fit import Steps, fit_group
from eora_lab.run.groups import stacked
from eora_lab.run.report import LayerReport


@timing("errors")
def compress_linears(
    model: nn.Module,
    names: Sequence[str],
    statistics: InputStatistics,
    steps: Steps,
    rank: int,
    share: float = 1.0,
) -> list[tuple[CompensatedLinear, LayerReport]]:
    """Compress one linear, or several that share A, compensate them at `rank`, and put them in place.

    share: of the drift that could be made good.
    Raises EoraLabError with the layer's name, such as where a weight is not finite.
    """
    linears = [linear_at(model, name) for name in names]
    usable = statistics.or_identity(steps.recipe.held_out > 0)
    with naming(" and ".join(names)):
        drifts = [drift_step(linear.weight, usable, share) for linear in linears]
        step = None
        if any(one is not None for one, _ in drifts):
            pairs = zip(linears, drifts, strict=True)
            step = stacked([torch.zeros_like(a.weight).float() if one is None else one for a, (one, _) in pairs])
        group = steps.group(names, [linear.weight for linear in linears], usable)
        fit = fit_group(group, usable, steps, rank, step)
    optimum = SOLVERS[steps.recipe.method] in (eora, eora_fisher)
    total = steps.loss(group, fit.residual, usable) if optimum and group.rows else None  # roots are dropped below
    factors = fit.factors.cut(group.sizes, names)
    modules, judged, before = [], [], 0.0
    for name, linear, compressed, own in zip(names, linears, fit.compressed, factors, strict=True):
        modules.append(CompensatedLinear(linear, compressed, own))
        model.set_submodule(name, modules[-1])
        found, before = _judged(name, linear, modules[-1], group.parts(fit.residual)[name], statistics, usable, steps)
        judged.append(found)
    total = before if optimum and not group.rows else total
    reports = [
        LayerReport(
            name=name,
            out_features=module.out_features,
            in_features=module.in_features,
            rank=module.rank,
            A_of=module.factors.A_of,
            spectrum=spectrum_summary(fit.low_rank, fit.residual.shape, total),
            tokens=statistics.tokens,
            pooled_tokens=statistics.pooled_tokens,
            shrinkage=fit.shrinkage,
            nbytes=module.nbytes,
            seconds_compress=fit.seconds_compress / len(names),
            seconds_solve=fit.seconds_solve / len(names),
            diagonal=statistics.diagonal,
            data_free=usable is not statistics,
            drift=drift,
            **found,
        )
        for name, module, (_, drift), found in zip(names, modules, drifts, judged, strict=True)
    ]
    return list(zip(modules, reports, strict=True))


def _judged(
    name: str,
    linear: nn.Linear,
    module: CompensatedLinear,
    left: Float[Tensor, "out in"],
    statistics: InputStatistics,
    usable: InputStatistics,
    steps: Steps,
) -> tuple[dict[str, Any], float]:
    """Errors of a layer, as fields of `LayerReport`, and the output energy of its residual, which is `left`."""
    weight, A, B = linear.weight.float(), module.lora_A.float(), module.lora_B.float()

    def energies(seen: InputStatistics) -> tuple[float, float, float]:
        """Of the output, its error before, its error after."""
        return output_energy(weight, seen.metric) or 1.0, *energies_with_path(left, A, B, seen.metric)

    signal, before, after = energies(usable)
    found: dict[str, Any] = {"error_before": before / signal, "error_after": after / signal}
    if steps.reround and steps.weights:
        given = residual(linear.weight, steps.weights[name])
        found["error_given"] = output_energy(given, usable.metric) / signal
    held_out = energies(usable.held_out) if usable.held_out else None
    found["held_out_before"] = held_out and held_out[1] / held_out[0]
    found["held_out_after"] = held_out and held_out[2] / held_out[0]
    outputs = steps.outputs.get(name) if needs_outputs(steps.recipe.method) else None
    if outputs:
        for when, error in (("before", left), ("after", left - B @ A)):
            found[f"nats_{when}"] = outputs.cost(error, statistics.metric) / 2
        outputs.forget()
    return found, before


def spectrum_summary(low_rank: LowRank, shape: torch.Size, error_energy: float | None) -> dict[int, float]:
    """Share of the error energy that ranks 1, 2, 4, ... and the layer's own remove, in the solver's metric.

    error_energy: of R in the solver's metric, where that is known (`Steps.loss`). It is needed where the spectrum ends
    early; without it the summary is then empty.
    """
    spectrum = low_rank.spectrum
    total = spectrum.sum().item() if len(spectrum) == min(shape) else error_energy
    if total is None:
        return {}
    ranks = sorted({2**k for k in range(16)} | {low_rank.rank})
    return {r: spectrum[:r].sum().item() / total if total else 1.0 for r in ranks if 0 < r <= len(spectrum)}
