"""Weights that come compressed: can they be a compression of this model's?"""

import hashlib
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.compress import CodebookWeight, Compressed, GgufWeight, GridWeight, HqqWeight, residual, tagged_state_dict
from eora_lab.environment import step
from eora_lab.errors import EoraLabError
from eora_lab.formats.checkpoint import Checkpoint
from eora_lab.model.structure import block_linears
from eora_lab.progress import each

STEPS = 1.5  # of its grid, that GPTQ's W^ may be away from W: 0.3 to 0.7 in a real model, 0.96 at the worst seen
SHIFT = 0.5  # of a step, that W^ may be off on average: 0.01 in a real model, 1 where zero points are read one off


def named_for(model: nn.Module, weights: Mapping | None) -> Mapping | None:
    """Weights that came compressed by the names of the model's linears. Raises EoraLabError as `Checkpoint.of`."""
    return weights.of(model) if isinstance(weights, Checkpoint) else weights


def origin_of(weights: Mapping | None) -> dict[str, str]:
    """What a run keeps of where they came from: how they were compressed, and of a `Checkpoint` its path and digest."""
    if not isinstance(weights, Checkpoint):
        return {} if weights is None else {"base": "given"}
    place = {"checkpoint": str(weights.path.resolve()), "checkpoint_sha256": weights.sha256()}
    return {"base": weights.base} | place


@step("checks")
def check_given(model: nn.Module, weights: Mapping, source: str = "", progress: bool = True) -> str:
    """A digest of weights that came compressed, by the model's names.

    source: that an error names.
    Raises EoraLabError when one belongs to no linear, is of another shape, or cannot be a compression of that linear:
    when it is further from W than `farthest`, or further than its own grid explains, see `steps_away`.
    """
    modules, digest = block_linears(model), hashlib.sha256()
    source = f"{source}: " if source else ""
    for name in each(weights, "compressed weights", "layer", progress):
        if name not in modules:
            raise EoraLabError(f"{source}{name} comes compressed, but is no linear in the decoder blocks of this model")
        given = weights[name]
        _check_one(f"{source}{name}", given, modules[name].weight)
        for tensor in tagged_state_dict(given).values():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_one(name: str, given: Compressed, weight: Tensor) -> None:
    """Raise EoraLabError when `given` cannot be a compression of the weight."""
    if given.shape != weight.shape:
        raise EoraLabError(
            f"{name} comes compressed as {tuple(given.shape)}, but is {tuple(weight.shape)} in this model: "
            "it is not the original model"
        )
    error = residual(weight, given)
    if not torch.isfinite(error).all():
        raise EoraLabError(f"{name} comes compressed with NaN or Inf: the checkpoint is damaged, get it again")
    distance, norm = error.norm(), weight.float().norm()
    (steps, shift), most = steps_away(error, given), farthest(given)
    if not abs(shift) <= SHIFT:
        raise EoraLabError(
            f"{name} comes compressed, but {shift:+.2f} steps of its grid away from the weight on average: its zero "
            "points are read one off, so correct the format that its configuration names (checkpoint_format: gptq or "
            "gptq_v2)"
        )
    if not (distance <= most * norm and steps <= STEPS):
        beyond = f"{steps:.1f} steps of its grid where {STEPS} are" if steps else f"where {most:.2f} times is"
        raise EoraLabError(
            f"{name} comes compressed, but {distance / norm:.2f} times the weight's norm away from it, {beyond} the "
            "most: this is not the model that it was made from"
        )


def farthest(given: Compressed) -> float:
    """The most that W^ can be away from W, in times |W|.

    Zero is 1 away, and unrelated weights of the same size sqrt(2). Rounding to the nearest level of a format of b bits
    leaves about 2^-b, and methods that move weights on purpose twice that; allowed is 2^(1 - b/2), so 0.5 at 4 bits and
    0.12 at 8. What is pruned, or came in full, may be anywhere up to 1; grids have a bound of their own, `steps_away`.
    """
    return min(1.0, 2 ** (1 - given.bits / 2)) if isinstance(given, CodebookWeight | GgufWeight) else 1.0


def steps_away(error: Float[Tensor, "out in"], given: Compressed) -> tuple[float, float]:
    """How far W^ is from W in steps of its grid: root mean square, and on average.

    In steps the bound is one for all bits, group sizes and outliers; against |W| it is about 0.5 in 4 bits and 1 in 3.
    Rounding to nearest gives 1 / sqrt(12) = 0.29. GPTQ moves weights to make good for others, which adds to the first
    number and not to the second; a pruner moves them further, so that the first is 0 where half of W^ and more is zero.
    Both are 0 where there is no grid.
    """
    lattice = given.lattice() if isinstance(given, GridWeight | HqqWeight) else None
    if lattice is None:
        return 0.0, 0.0
    error, steps, kept = error.cpu(), lattice.step.cpu()[:, lattice.group.cpu()], given.dense().cpu() != 0
    shift = (error * steps).sum() / steps.square().sum().clamp_min(1e-30)
    pruned = lattice.kept is not None or 2 * kept.sum() <= kept.numel()
    return 0.0 if pruned else (error[kept].norm() / steps[kept].norm()).item(), shift.item()
