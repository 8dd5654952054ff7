"""The file of the low-rank paths that a step of distillation gave: a run has all of these, or those of its blocks."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from eora_lab.compensate import StoredFactors
from eora_lab.errors import EoraLabError, as_setting, one_line
from eora_lab.files import add_tensor, write_safetensors
from eora_lab.layer.linear import CompensatedLinear

DISTILLED = "distilled.safetensors"


def write_distilled(path: Path, layers: Mapping[str, CompensatedLinear], found: Mapping[str, float]) -> None:
    """Store the paths of layers, by their full names, and what came of the step (`Report.distilled`)."""
    tensors = {
        f"{name}.{key}": one for name, layer in layers.items() for key, one in layer.factors.state_dict().items()
    }
    about = json.dumps(found)
    write_safetensors(path, tensors, {"distilled": about, "sha256": _digest(about, tensors)})


def read_distilled(path: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What came of the step, and the tensors of all paths by full name. Raises EoraLabError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()["distilled"]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if file.metadata()["sha256"] != _digest(about, tensors):
                raise ValueError("its checksum does not agree")
        return as_setting(dict[str, float], json.loads(about), "distilled"), tensors
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, EoraLabError) as error:
        raise EoraLabError(
            f"{path} is missing or damaged ({one_line(error)}): delete it, and start the run again to make it anew"
        ) from error


def distilled_factors(path: Path, names: Iterable[str]) -> dict[str, StoredFactors]:
    """Full name of a layer -> its path. Raises EoraLabError when the file is damaged, or of another run."""
    paths: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_distilled(path)[1].items():
        owner, _, rest = key.partition(".lora_")
        paths.setdefault(owner, {})[f"lora_{rest}"] = tensor
    found = {}
    for name in names:
        try:
            found[name] = StoredFactors.from_state_dict(paths[name])
        except KeyError as error:
            raise EoraLabError(f"{path} has no path for {name}: it is of another run, so delete it") from error
    return found


def install_distilled(path: Path, layers: Mapping[str, CompensatedLinear]) -> dict[str, float]:
    """Give layers, by their full names, the paths of a file. Returns what came of the step.

    Raises EoraLabError when the file is damaged, or of another run.
    """
    for name, factors in distilled_factors(path, layers).items():
        if [one.shape for one in factors.matrices()] != [layers[name].lora_A.shape, layers[name].lora_B.shape]:
            raise EoraLabError(f"{path} has a path of another size for {name}: it is of another run, so delete it")
        layers[name].set_factors(factors)
    return read_distilled(path)[0]


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        add_tensor(found, name, tensors[name])
    return found.hexdigest()
