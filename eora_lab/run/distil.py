"""One bounded step of distillation after the pass: low-rank paths alone change, weights and their codes stay.

Every layer makes a step of its own (`compensate.distillation`). How much of all of them is taken is found by a line
search: the divergence from the original model on held-out tokens is the judge, and taking nothing is among the choices.
"""

import time
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from eora_lab.calibrate.distillation import Targets
from eora_lab.calibrate.stream import BlockStream
from eora_lab.compensate import StoredFactors, store_factors
from eora_lab.compensate.distillation import DistillationStep
from eora_lab.environment import step
from eora_lab.errors import naming
from eora_lab.layer.linear import CompensatedLinear, compensated, unpacked
from eora_lab.model.structure import decoder_blocks
from eora_lab.products import fast_products
from eora_lab.progress import each
from eora_lab.run.recipe import Recipe

SHARES = tuple(2.0**-k for k in range(6))  # of the step, that are tried
SUMS = 2**31  # bytes of what is measured at once; more blocks take another backward pass
FLOAT = 4


@step("distillation")
@fast_products()
@torch.no_grad()
def distil(model: nn.Module, targets: Targets, recipe: Recipe, progress: bool = True) -> dict[str, float]:
    """Change the paths of a compressed model. Returns what came of it, see `Report.distilled`.

    targets: of the original model. Only layers that enough tokens came to change.
    """
    started = time.perf_counter()
    layers = {name: one for name, one in compensated(model).items() if one.rank}
    before = {name: one.factors for name, one in layers.items()}
    made: dict[float, dict[str, StoredFactors]] = {share: dict(before) for share in SHARES}
    for names in each(list(sweeps(model, layers)), "distil", "sweep", progress):
        pulls, far = targets.pulls(model, names)
        for name in names:
            pull, layer = pulls.pop(name), layers[name]
            if pull.inputs.or_identity(held_out=False) is not pull.inputs or not pull.gradient.any():
                continue
            with naming(name):
                move = DistillationStep(pull, *layer.factors.dense(), far / len(layers))
                for share in SHARES:
                    path = move.taken(share)
                    refit = (path.dense(), pull.inputs) if recipe.refit else None
                    made[share][name] = store_factors(path, recipe.factor_bits, refit, pull.outputs)
    best, first = 0.0, held_out_divergence(model, targets)
    lowest = first
    for share in SHARES:
        use(layers, made[share])
        found = held_out_divergence(model, targets)
        if found < lowest:
            best, lowest = share, found
        elif best:
            break
    use(layers, made[best] if best else before)
    return {"before": first, "after": lowest, "share": best, "seconds": time.perf_counter() - started}


def held_out_divergence(model: nn.Module, targets: Targets) -> float:
    """KL(original ‖ model as it is), nats a token, on the held-out tokens. One block is unpacked at a time."""
    stream = BlockStream(model, targets.judged(), 0.0, targets.contract)
    for index, block in enumerate(stream.blocks.values()):
        with unpacked(block):
            stream.advance(index)
    return targets.divergence(stream.hidden)


def use(layers: Mapping[str, CompensatedLinear], factors: Mapping[str, StoredFactors]) -> None:
    """Put paths in place."""
    for name, layer in layers.items():
        layer.set_factors(factors[name])


def sweeps(model: nn.Module, layers: Mapping[str, CompensatedLinear]) -> Iterator[list[str]]:
    """The layers whose sums are held together: those of neighbouring blocks, the last ones first."""
    names: list[str] = []
    held = 0
    for prefix in reversed(decoder_blocks(model)):
        own = [name for name in layers if name.startswith(f"{prefix}.")]
        size = sum(sums(layers[name].out_features, layers[name].in_features) for name in own)
        if names and held + size > SUMS:
            yield names
            names, held = [], 0
        names, held = names + own, held + size
    if names:
        yield names


def sums(out_features: int, in_features: int) -> int:
    """Bytes of what is measured of a layer: G, F and S."""
    return FLOAT * (out_features * in_features + out_features**2 + in_features**2)
