"""One linear of a model: compressed, compensated, put in place, and what the report says of it."""

import torch
from torch import nn

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
from eora_lab.run.fit import Steps, fit_layer
from eora_lab.run.report import LayerReport


@timing("errors")
def compress_linear(
    model: nn.Module, name: str, statistics: InputStatistics, steps: Steps, rank: int, share: float = 1.0
) -> tuple[CompensatedLinear, LayerReport]:
    """Compress one linear, compensate it at `rank`, and put it in place.

    share: of the drift that could be made good.
    Raises EoraLabError with the layer's name, such as where a weight is not finite.
    """
    linear, recipe = linear_at(model, name), steps.recipe
    usable = statistics.or_identity(recipe.held_out > 0)
    with naming(name):
        step, drift = drift_step(linear.weight, usable, share)
        fit = fit_layer(name, linear.weight, usable, steps, rank, step)
    module = CompensatedLinear(linear, fit.compressed, fit.factors)
    model.set_submodule(name, module)
    weight = linear.weight.float()
    A, B = module.lora_A.float(), module.lora_B.float()

    def energies(seen: InputStatistics) -> tuple[float, float, float]:
        """Of the output, its error before, its error after."""
        return output_energy(weight, seen.metric) or 1.0, *energies_with_path(fit.residual, A, B, seen.metric)

    signal, before, after = energies(usable)
    given = None
    if steps.reround and steps.weights:
        given = output_energy(residual(linear.weight, steps.weights[name]), usable.metric) / signal
    held_out = energies(usable.held_out) if usable.held_out else None
    total = None
    if SOLVERS[recipe.method] in (eora, eora_fisher):
        total = before if SOLVERS[recipe.method] is eora else steps.loss(name, fit.residual, usable)
    outputs = steps.outputs.get(name) if needs_outputs(recipe.method) else None
    errors = (fit.residual, fit.residual - B @ A) if outputs else ()
    nats = [outputs.cost(error, statistics.metric) / 2 for error in errors] if outputs else [None, None]
    if outputs:
        outputs.forget()
    return module, LayerReport(
        name=name,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        rank=module.rank,
        error_before=before / signal,
        error_after=after / signal,
        spectrum=spectrum_summary(fit.low_rank, weight.shape, total),
        tokens=statistics.tokens,
        pooled_tokens=statistics.pooled_tokens,
        held_out_before=held_out and held_out[1] / held_out[0],
        held_out_after=held_out and held_out[2] / held_out[0],
        shrinkage=fit.shrinkage,
        nbytes=module.nbytes,
        seconds_compress=fit.seconds_compress,
        seconds_solve=fit.seconds_solve,
        diagonal=statistics.diagonal,
        nats_before=nats[0],
        nats_after=nats[1],
        data_free=usable is not statistics,
        error_given=given,
        drift=drift,
    )


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
