"""PEFT LoRA adapters: a folder of `adapter_config.json` and `adapter_model.safetensors`.

Ragged: each layer at its own rank, the exact form. Universal: every layer padded with zeros to one rank, for loaders
that know one rank and one scaling only. Experts of a mixture: see `peft_experts` and `fused`.
"""

import math
import re
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eora_lab.compensate import LowRank
from eora_lab.errors import EoraLabError
from eora_lab.files import write_json, write_safetensors
from eora_lab.formats.adapter_config import CONFIG, left_out_by, not_plain, read_config
from eora_lab.formats.fused import fused_linears, one_by_one
from eora_lab.formats.made_for import WEIGHTS, MadeFor
from eora_lab.formats.names import KEY, Factors, key_of, pairs
from eora_lab.formats.peft_experts import pack, parameter_targets, unpack
from eora_lab.formats.renaming import as_written, by_own_names

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank can be
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROUNDING = 0.01  # share of |B A| that casting factors to 16 bits may change; 0.0005 is usual


def write_adapter(
    folder: Path | str,
    factors: Factors,
    base_model: str,
    universal: bool = False,
    made_for: MadeFor | None = None,
    model: nn.Module | None = None,
) -> None:
    """Write an adapter folder, in float16, whose scaling is 1 in every loader: r = lora_alpha.

    Ragged: r is the highest rank, rank_pattern and alpha_pattern name the layers of other ranks, and layers of rank 0
    are left out. Experts of a layer are one entry, at the highest of their ranks, as peft takes them.
    Universal: r is the next rank that vLLM serves, every layer of `factors` is padded with zeros to it, and both
    patterns are empty; pass all linears of the decoder blocks, those of rank 0 too. Experts are written one by one,
    gate and up apart, by the names of the model's checkpoint.
    made_for: which compressed weights it belongs to, and no others.
    model:    the base model, compressed or not, or its modules alone (`load_skeleton`). Without it, target_modules has
              full names, fan_in_fan_out is false, and all linears have the names that they have in `factors`. With it,
              tensors of linears that peft would take for others have their published names (see `renaming`), by which
              vLLM knows them too; the configuration has the model's own.
    Raises EoraLabError when there is nothing to write, when the rank is above what a universal adapter can have, and
    when factors do not fit float16, or peft would give some to another linear.
    """
    folder, highest = Path(folder), max((len(A) for A, _ in factors.values()), default=0)
    if not highest:
        raise EoraLabError(f"{folder}: there is no low-rank path to write, every rank is 0")
    if universal:
        highest = served_rank(highest)
        factors = {module: pad(A, B, highest) for module, (A, B) in factors.items()}
    modules = dict(model.named_modules()) if model is not None else {}
    fused = fused_linears(model) if model is not None else []
    factors = {module: in_half(A, B, module) if len(A) else (A, B) for module, (A, B) in factors.items()}
    entries = pack(one_by_one(factors, fused), ()) if universal else pack(factors, fused)
    pattern = {entry.target: entry.rank for entry in entries if entry.rank != highest}
    targets = [entry.target for entry in entries if not entry.parameter]
    parameters = [entry.target for entry in entries if entry.parameter]
    alike = not parameters and {len(A) for A, _ in factors.values()} == {highest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": highest,
        "lora_alpha": highest,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(short_names(targets, modules) if alike else targets),
        "fan_in_fan_out": any(getattr(modules.get(target), "transposed", False) for target in targets),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
    tensors, keys = {}, [entry.key for entry in entries]
    written = as_written(keys, model) if model is not None else dict(zip(keys, keys, strict=True))
    for entry in entries:
        for half, tensor in (("A", entry.A), ("B", entry.B)):  # which may be parts of one, or twice the same
            tensors[key_of(written[entry.key], half)] = tensor.clone(memory_format=torch.contiguous_format)
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"} | (made_for.metadata() if made_for else {}))
    write_json(folder / CONFIG, config)


def short_names(chosen: Collection[str], known: Collection[str]) -> set[str]:
    """What target_modules may say for some of a model's modules: the last part of each name, or all of it.

    A number names a block as well, and some parts another module, such as one of a vision tower: peft would take both.
    """
    last = {name: name.rpartition(".")[2] for name in chosen}
    others = {name.rpartition(".")[2] for name in known if name not in last}
    return {last[name] if known and not ({last[name]} & others or last[name].isdigit()) else name for name in last}


def served_rank(rank: int) -> int:
    """The smallest rank that vLLM serves and that holds `rank`. Raises EoraLabError when there is none."""
    if rank > SERVED_RANKS[-1]:
        raise EoraLabError(f"rank {rank} is above {SERVED_RANKS[-1]}, the highest that a universal adapter can have")
    return next(served for served in SERVED_RANKS if served >= rank)


def pad(
    A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], rank: int
) -> tuple[Float[Tensor, "padded in"], Float[Tensor, "out padded"]]:
    """The same product B A at a higher rank: rows of zeros below A, columns of zeros beside B."""
    return F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - B.shape[1]))


def in_half(
    A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], module: str
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """The factors in float16: as they are, or balanced where that would overflow or round small numbers away.

    Raises EoraLabError when B A does not survive either.
    """
    balanced = LowRank(A.float(), B.float(), A.new_empty(0)).balanced()
    for a, b in ((A, B), (balanced.A, balanced.B)):
        change, norm = product_norm(A, B, a.half(), b.half()), product_norm(A, B)
        if change <= ROUNDING * norm:
            return a.half(), b.half()
    raise EoraLabError(f"{module}: its factors do not fit float16, B A would change by {change:.2g} and is {norm:.2g}")


def product_norm(
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    a: Float[Tensor, "rank in"] | None = None,
    b: Float[Tensor, "out rank"] | None = None,
) -> float:
    """|B A - b a|, by the Gram matrices of [B b] and [A -a], so that no product of the layer's size is formed."""
    left, right = B.double(), A.double()
    if a is not None and b is not None:
        left, right = torch.cat([left, b.double()], 1), torch.cat([right, -a.double()])
    return ((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt().item()


def read_files(folder: Path | str) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of an adapter folder as they stand. Raises EoraLabError when a file is missing or damaged."""
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / WEIGHTS).exists():
        pickled = "; pickled weights (.bin) are refused" if (folder / "adapter_model.bin").exists() else ""
        raise EoraLabError(f"{folder}: {WEIGHTS} is missing{pickled}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise EoraLabError(f"{folder}: {WEIGHTS} cannot be read ({error}): copy or download it again") from error
    for key, tensor in tensors.items():
        if KEY.fullmatch(key) and tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise EoraLabError(f"{folder}: {key} is {kind}, which is not read: save the adapter in float16 or float32")
    return tensors, config


def by_pattern(config: dict, field: str, default: str, module: str) -> int | float:
    """A layer's rank or alpha as peft takes it: from the first key of the pattern that ends the layer's name."""
    for key, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config[default]


def scaling(config: dict, module: str) -> float:
    """What a layer's B A is multiplied by: alpha / r, with rsLoRA alpha / sqrt r, as peft does it.

    One exception: r = lora_alpha with a rank_pattern and no alpha_pattern, not written by peft (which leaves its
    version), is GPTQModel's ragged adapter, and it means 1.
    """
    patterns = bool(config.get("rank_pattern")), bool(config.get("alpha_pattern"))
    if patterns == (True, False) and config["r"] == config["lora_alpha"] and "peft_version" not in config:
        return 1.0
    return peft_scaling(config, module)


def peft_scaling(config: dict, module: str) -> float:
    """Exactly what peft multiplies a layer's B A by."""
    rank = by_pattern(config, "rank_pattern", "r", module)
    alpha = by_pattern(config, "alpha_pattern", "lora_alpha", module)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_factors(tensors: dict[str, Tensor], config: dict) -> Factors:
    """Module name -> (A, B), the scaling multiplied into B. Experts that are one entry come apart: see `unpack`.

    Raises EoraLabError when the adapter is more than such products (see `not_plain`), or a half is missing.
    """
    for problem in not_plain(config):
        raise EoraLabError(problem)
    found, unknown = pairs(tensors)
    if unknown:
        raise EoraLabError(f"the adapter holds {unknown[0]}, which is no lora_A or lora_B matrix")
    if not found:
        raise EoraLabError("the adapter holds no lora_A and lora_B matrices")
    targets = parameter_targets(list(found), config)
    factors, ranks = {}, {}
    for module, halves in found.items():
        if len(halves) < 2:
            raise EoraLabError(f"the adapter holds lora_{next(iter(halves))} of {module} without its other half")
        A, B = halves["A"], halves["B"]
        if len(A) != B.shape[1]:
            raise EoraLabError(f"{module}: lora_A has rank {len(A)}, lora_B {B.shape[1]}")
        target = targets.get(module, module)
        ranks[module] = rank = int(by_pattern(config, "rank_pattern", "r", target))
        if module not in targets and len(A) != rank:
            raise EoraLabError(f"{module}: its rank is {len(A)}, and {rank} by r and rank_pattern in {CONFIG}")
        if module not in targets and (key := left_out_by(config, module)):
            raise EoraLabError(f"{module} has factors, and {key} in {CONFIG} leaves it out: correct it")
        factor = scaling(config, target)
        scaled = B if factor == 1 else B.float() * factor
        if not (A.isfinite().all() and scaled.isfinite().all()):
            raise EoraLabError(f"{module}: NaN or Inf in its factors")
        factors[module] = A, scaled
    return unpack(factors, targets, ranks)


def read_adapter(folder: Path | str, model: nn.Module | None = None) -> tuple[Factors, dict]:
    """(factors, config) of an adapter folder; see `adapter_factors`. Raises EoraLabError when it cannot be used.

    model: that it is for, or its modules alone, whose names the factors get. Without it they keep those of the file.
    """
    tensors, config = read_files(folder)
    try:
        return adapter_factors(by_own_names(tensors, model) if model is not None else tensors, config), config
    except EoraLabError as error:
        raise EoraLabError(f"{folder}: {error}") from error
