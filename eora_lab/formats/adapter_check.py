"""What other tools would make of a PEFT adapter: the mistakes of each loader, named before it makes them.

The rules of a loader are in `eora_lab.formats.loaders`; here is what none of them takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from eora_lab.errors import EoraLabError
from eora_lab.formats.adapter_config import not_plain
from eora_lab.formats.fused import Fused, Shapes, apart_shapes, fused_linears, whole
from eora_lab.formats.loaders import LOADERS
from eora_lab.formats.loaders.given import Given, some
from eora_lab.formats.names import Factors, key_of, match_names, pairs
from eora_lab.formats.peft import adapter_factors, scaling
from eora_lab.formats.peft_experts import parameter_targets
from eora_lab.formats.renaming import by_own_names


@dataclass(frozen=True)
class Finding:
    """One thing that a loader ("any": all of them) refuses, ignores or computes otherwise than meant."""

    loader: str
    problem: str

    def __str__(self) -> str:
        return f"{self.loader}: {self.problem}"


def check_adapter(
    tensors: dict[str, Tensor], config: dict, shapes: Shapes, model: nn.Module | None = None
) -> list[Finding]:
    """Everything that one of `LOADERS` would get wrong; empty when all load it alike.

    No form of an adapter of fused experts is taken by all of them.

    tensors, config: from `read_files`.
    shapes:          of all linears in the decoder blocks of the base model.
    model:           its modules alone (`load_skeleton`), for what tools make of their names.
    """
    fused: list[Fused] = []
    written = list(pairs(tensors)[0])
    if model is not None:
        fused, tensors = fused_linears(model), by_own_names(tensors, model)
    found, unknown = pairs(tensors)
    try:
        targets, wrong = parameter_targets(list(found), config), []
    except EoraLabError as error:
        targets, wrong = {}, [str(error)]
    together = targets.keys() - match_names(found, shapes).keys()
    found = {module: halves for module, halves in found.items() if module not in together}
    apart = apart_shapes(shapes, fused)
    if match_names(found, apart.keys() - shapes.keys()):
        shapes = apart
    names = match_names(found, shapes)
    known = {module: halves for module, halves in found.items() if names.get(module) == module}
    ranks = {module: len(halves["A"]) for module, halves in known.items() if len(halves) == 2}
    anywhere = [
        *wrong,
        *_damage(found, unknown, names, shapes),
        *_keys(found, tensors),
        *not_plain(config),
        *(_together(tensors, config, shapes) if together else ()),
    ]
    given = Given(config, ranks, shapes, targets, min(together, default=None), fused, written, model)
    findings = [Finding("any", problem) for problem in anywhere]
    for name, loader in LOADERS.items():
        findings += [Finding(name, problem) for problem in loader.problems(given)]
        findings += [Finding(name, problem) for problem in _scaling(config, ranks, loader.scaling)]
    return findings


def fix_adapter(tensors: dict[str, Tensor], config: dict, shapes: Shapes, model: nn.Module | None = None) -> Factors:
    """What to write as a universal adapter instead: every linear, the scaling in B, names spelt as the model's.

    Linears without a path get rank 0, which the universal form pads with zeros.
    Raises EoraLabError when a finding cannot be mended: a missing or misshapen half, a layer that the model does not
    have, NaN or Inf, DoRA, saved modules.
    """
    fused = fused_linears(model) if model is not None else []
    if model is not None:
        tensors = by_own_names(tensors, model)
    factors = whole(adapter_factors(tensors, config), fused)
    names = match_names(factors, shapes)
    mended = {}
    for module, (A, B) in factors.items():
        if module not in names:
            raise EoraLabError(f"the model has no linear {module} in its decoder blocks")
        if (len(B), A.shape[1]) != tuple(shapes[names[module]]):
            raise EoraLabError(
                f"{module}: factors of a {len(B)}x{A.shape[1]} layer, {_size(shapes[names[module]])} here"
            )
        mended[names[module]] = A, B
    like = next(iter(tensors.values()))
    empty = {m: (like.new_zeros(0, i), like.new_zeros(o, 0)) for m, (o, i) in shapes.items() if m not in mended}
    return mended | empty


def _damage(found: dict, unknown: list[str], names: dict[str, str], shapes: Shapes) -> Iterator[str]:
    if unknown:
        yield f"{some(unknown)} is no lora_A or lora_B matrix of a layer"
    if strangers := [module for module in found if module not in names]:
        yield f"the model has no linear {some(strangers)} in its decoder blocks"
    if respelt := [module for module in found if names.get(module, module) != module]:
        yield f"{some(respelt)} is spelt otherwise in the model ({names[respelt[0]]})"
    if halved := [module for module, halves in found.items() if len(halves) == 1]:
        yield f"one of lora_A and lora_B is missing of {some(halved)}"
    for module, halves in found.items():
        for half, tensor in halves.items():
            if not tensor.isfinite().all():
                yield f"lora_{half} of {module} has NaN or Inf"
        if module in names:
            out_features, in_features = shapes[names[module]]
            if "A" in halves and halves["A"].shape[1] != in_features:
                yield f"lora_A of {module} is for {halves['A'].shape[1]} inputs, the layer has {in_features}"
            if "B" in halves and len(halves["B"]) != out_features:
                yield f"lora_B of {module} is for {len(halves['B'])} outputs, the layer has {out_features}"
        if len(halves) == 2 and len(halves["A"]) != halves["B"].shape[1]:
            yield f"{module}: lora_A has rank {len(halves['A'])}, lora_B {halves['B'].shape[1]}"


def _keys(found: dict, tensors: dict[str, Tensor]) -> Iterator[str]:
    keys = [key_of(module, half) for module, halves in found.items() for half in halves]
    if respelt := [key for key in keys if key not in tensors]:
        yield f"looks for {some(respelt)}, which has another key here"


def _together(tensors: dict[str, Tensor], config: dict, shapes: Shapes) -> Iterator[str]:
    """Experts that are one entry, as peft takes them."""
    try:
        for module, (A, B) in adapter_factors(tensors, config).items():
            if module not in shapes:
                yield f"the model has no linear {module} in its decoder blocks"
            elif (len(B), A.shape[1]) != tuple(shapes[module]):
                yield f"{module}: factors of a {len(B)}x{A.shape[1]} layer, {_size(shapes[module])} here"
    except EoraLabError as error:
        yield str(error)


def _scaling(config: dict, ranks: dict[str, int], scale: Callable[[dict, str], float]) -> Iterator[str]:
    """A loader's own idea of a layer's scaling beside what is meant."""
    if wrong := [m for m in ranks if abs(scale(config, m) / scaling(config, m) - 1) > 1e-6]:
        is_, meant = scale(config, wrong[0]), scaling(config, wrong[0])
        yield f"scales {some(wrong)} by {is_:.4g}, {meant:.4g} is meant (r, lora_alpha and their patterns)"


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
