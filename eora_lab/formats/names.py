"""Names of linears in adapters: keys of tensors, and what they are called in a model."""

import re
from collections.abc import Collection, Iterable

from jaxtyping import Float
from torch import Tensor

from eora_lab.errors import EoraLabError

KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")

Factors = dict[str, tuple[Float[Tensor, "_rank _in"], Float[Tensor, "_out _rank"]]]  # module name -> (A, B)


def pairs(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Module name -> {"A": ..., "B": ...} (one may be missing), and the keys that are neither.

    Raises EoraLabError when a half is there twice, under the names of several adapters.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if not (match := KEY.fullmatch(key)) or tensor.ndim != 2:
            unknown.append(key)
        elif match[2] in found.setdefault(match[1], {}):
            raise EoraLabError(f"the adapter holds lora_{match[2]} of {match[1]} twice: save one adapter alone")
        else:
            found[match[1]][match[2]] = tensor
    return found, unknown


def key_of(module: str, half: str) -> str:
    """The key that every loader knows. `pairs` also reads those of a state_dict, with the adapter's name in them."""
    return f"base_model.model.{module}.lora_{half}.weight"


def plain(name: str) -> str:
    """A name in lower case and without `language_model`."""
    return ".".join(part for part in name.lower().split(".") if part != "language_model")


def match_names(modules: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Adapter's module name -> the model's; those that the model lacks are left out.

    They may differ in case, for GPTQModel writes lower case, and by `language_model`, which a model that also sees has.
    Raises EoraLabError where two are one module of the model.
    """

    spelt = {plain(name): name for name in known}
    names = {m: m if m in known else spelt[plain(m)] for m in modules if m in known or plain(m) in spelt}
    first: dict[str, str] = {}
    for module, name in names.items():
        if first.setdefault(name, module) != module:
            raise EoraLabError(f"{first[name]} and {module} are both {name} of the model")
    return names
