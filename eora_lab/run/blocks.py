"""The file of a finished block: its compressed layers, its part of the report, and a checksum of both."""

import json
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from eora_lab.compensate.factors import with_shared
from eora_lab.errors import EoraLabError, naming, one_line
from eora_lab.files import DamagedError, read_checked, write_checked
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.model.structure import linear_at
from eora_lab.run.report import LayerReport, layer_report

AGAIN = "start the run again with the same settings to make it anew"


def write_block(path: Path, modules: dict[str, CompensatedLinear], layers: list[LayerReport]) -> None:
    """Store a block. modules: full name -> layer. layers: its part of the report."""
    tensors = {f"{name}.{key}": tensor for name, one in modules.items() for key, tensor in one.stored().items()}
    write_checked(path, tensors, {"layers": json.dumps([asdict(layer) for layer in layers])})


def load_block(path: Path) -> tuple[list[LayerReport], dict[str, Tensor]]:
    """Its part of the report, and the tensors of its layers by full name, A of layers that share it with each of them.

    Tensors are mapped into memory.

    Raises DamagedError when the file is damaged, and EoraLabError when it cannot be read.
    """
    tensors, metadata = read_checked(path)
    try:
        return [layer_report(data) for data in json.loads(metadata["layers"])], with_shared(tensors)
    except (KeyError, TypeError, ValueError, EoraLabError) as error:
        raise DamagedError(f"{path} is damaged ({one_line(error)})") from error


def read_block(path: Path) -> tuple[list[LayerReport], dict[str, Tensor]]:
    """The same of a block that should be there. Raises EoraLabError, which says how to get it back."""
    try:
        return load_block(path)
    except DamagedError as error:
        raise EoraLabError(f"{error}: {AGAIN}") from error


def install_block(model: nn.Module, path: Path) -> list[LayerReport]:
    """Replace the linears of one block by what a file holds. Returns the block's part of the report.

    Raises EoraLabError when the file is damaged, or of another model.
    """
    layers, tensors = read_block(path)
    try:
        for layer in layers:
            prefix = layer.name + "."
            stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            with naming(str(path)):  # such as a storage kind that no plugin here brings
                old = linear_at(model, layer.name)
                model.set_submodule(layer.name, CompensatedLinear.from_stored(stored, old))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise EoraLabError(
            f"{path} is damaged, or of another model ({one_line(error)}): delete it, and {AGAIN}"
        ) from error
    return layers
