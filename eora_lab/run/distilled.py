"""The file of the low-rank paths that a step of distillation gave: a run has all of these, or those of its blocks."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from eora_lab.compensate import StoredFactors
from eora_lab.errors import EoraLabError, as_setting, one_line
from eora_lab.files import DamagedError, read_checked, write_checked
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.run.blocks import AGAIN

DISTILLED = "distilled.safetensors"


def write_distilled(path: Path, layers: Mapping[str, CompensatedLinear], found: Mapping[str, float]) -> None:
    """Store the paths of layers, by their full names, and what came of the step (`Report.distilled`)."""
    tensors = {
        f"{name}.{key}": one for name, layer in layers.items() for key, one in layer.factors.state_dict().items()
    }
    write_checked(path, tensors, {"distilled": json.dumps(found)})


def load_distilled(path: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What came of the step, and the tensors of all paths by full name; these are mapped into memory.

    Raises DamagedError when the file is damaged, and EoraLabError when it cannot be read.
    """
    tensors, metadata = read_checked(path)
    try:
        return as_setting(dict[str, float], json.loads(metadata["distilled"]), "distilled"), tensors
    except (KeyError, ValueError, EoraLabError) as error:
        raise DamagedError(f"{path} is damaged ({one_line(error)})") from error


def distilled_factors(path: Path, names: Iterable[str]) -> tuple[dict[str, float], dict[str, StoredFactors]]:
    """What came of the step, and the path of every layer by its full name.

    Raises EoraLabError, which says how to get it back, when the file is damaged, or of another run.
    """
    try:
        found, tensors = load_distilled(path)
    except DamagedError as error:
        raise EoraLabError(f"{error}: {AGAIN}") from error
    paths: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, rest = key.partition(".lora_")
        paths.setdefault(owner, {})[f"lora_{rest}"] = tensor
    try:
        return found, {name: StoredFactors.from_state_dict(paths[name]) for name in names}
    except KeyError as error:
        raise EoraLabError(f"{path} lacks a path of {error}: it is of another run; delete it, and {AGAIN}") from error


def install_distilled(path: Path, layers: Mapping[str, CompensatedLinear]) -> dict[str, float]:
    """Give layers, by their full names, the paths of a file. Returns what came of the step. Raises as above."""
    found, factors = distilled_factors(path, layers)
    for name, layer in layers.items():
        if [one.shape for one in factors[name].matrices()] != [layer.lora_A.shape, layer.lora_B.shape]:
            raise EoraLabError(
                f"{path} has a path of another size for {name}: it is of another run; delete it, and {AGAIN}"
            )
    for name, layer in layers.items():
        layer.set_factors(factors[name])
    return found
