"""What mlx-lm makes of an adapter in its own form: `load_adapters` of version 0.32 (mlx_lm/tuner/utils.py)."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eora_lab.errors import EoraLabError
from eora_lab.files import read_json
from eora_lab.formats.adapter_config import CONFIG
from eora_lab.formats.fused import Shapes
from eora_lab.formats.loaders.given import some
from eora_lab.formats.mlx_adapter import BLOCK, WEIGHTS, mlx_factors, within_block

HALVES = ("lora_a", "lora_b")


def is_mlx(folder: Path | str) -> bool:
    """Whether a folder is an adapter of this form."""
    return (Path(folder) / WEIGHTS).exists()


def read_mlx(folder: Path | str) -> tuple[dict[str, Tensor], dict]:
    """(tensors, configuration) of an adapter folder. Raises EoraLabError when a file is missing or damaged."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    try:
        return load_file(folder / WEIGHTS), config
    except (OSError, SafetensorError, ValueError) as error:
        raise EoraLabError(f"{folder}: {WEIGHTS} cannot be read ({error}): copy or download it again") from error


def check_mlx_adapter(tensors: dict[str, Tensor], config: dict, shapes: Shapes, model: nn.Module) -> Iterator[str]:
    """Everything that mlx-lm would refuse, or compute otherwise than meant.

    tensors, config: from `read_mlx`.
    shapes:          of all linears in the decoder blocks of the base model.
    model:           its modules alone.
    Raises EoraLabError for a model type whose names in mlx-lm are not known here.
    """
    settings = config.get("lora_parameters")
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        yield f"the adapter is of type {kind} (fine_tune_type), which is no low-rank product beside a weight"
    needed = {"rank", "scale", "dropout"}
    if not isinstance(settings, dict) or not needed <= settings.keys() or not isinstance(config.get("num_layers"), int):
        yield f"needs num_layers, and rank, scale and dropout in lora_parameters ({CONFIG})"
        return
    rank, keys = settings["rank"], settings.get("keys")
    empty = {m: (torch.empty(1, i, device="meta"), torch.empty(o, 1, device="meta")) for m, (o, i) in shapes.items()}
    known: dict[str, dict[str, list[int]]] = {}
    for name, *halves in mlx_factors(empty, model):
        axes = (-1, -2) if halves[0].ndim == 2 else (-2, -1)  # where the rank is
        sizes = [list(half.shape) for half in halves]
        for size, axis in zip(sizes, axes, strict=True):
            size[axis] = rank
        known[name] = dict(zip(HALVES, sizes, strict=True))
    pairs: dict[str, set[str]] = {}
    strangers, covered = [], _covered(known, keys, config["num_layers"])
    for name, tensor in tensors.items():
        module, _, half = name.rpartition(".")
        if module not in known or half not in HALVES:
            strangers.append(name)
            continue
        pairs.setdefault(module, set()).add(half)
        if list(tensor.shape) != known[module][half]:
            yield f"refuses {name}: it is {tuple(tensor.shape)}, and must be {tuple(known[module][half])}"
        if not tensor.isfinite().all():
            yield f"{name} has NaN or Inf"
    if strangers:
        yield f"refuses {some(strangers)}, which is no lora_a or lora_b of a linear in the blocks of the model"
    if halved := [module for module, halves in pairs.items() if len(halves) == 1]:
        yield f"fills in the other half of {some(halved)} by itself: one of lora_a and lora_b is missing"
    if outside := [module for module in pairs if module not in covered]:
        yield f"refuses {some(outside)}, which keys and num_layers leave out"


def _covered(known: dict, keys: list[str] | None, num_layers: int) -> set[str]:
    """The modules that get factors: by their full names in any block, by their names within one in the last blocks."""
    blocks = list(dict.fromkeys(match[1] for name in known if (match := BLOCK.fullmatch(name))))
    last = set(blocks[-max(num_layers, 0) :])
    return {
        name
        for name in known
        if (keys is not None and name in keys)
        or ((match := BLOCK.fullmatch(name)) and match[1] in last and (keys is None or within_block(name) in keys))
    }
