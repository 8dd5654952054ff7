"""PEFT LoRA adapters: a folder of `adapter_config.json` and `adapter_model.safetensors`.

Ragged: each layer at its own rank, the exact form. Universal: every layer padded with zeros to one rank, for loaders
that know one rank and one scaling only.
"""

import json
import math
import re
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.files import write_json, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank can be
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

Factors = dict[str, tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]]  # module name -> (A, B)


def write_adapter(folder: Path | str, factors: Factors, base_model: str, universal: bool = False) -> None:
    """Write an adapter folder, in float16, whose scaling is 1 in every loader: r = lora_alpha.

    Ragged: r is the highest rank, rank_pattern and alpha_pattern name the layers of other ranks, and layers of rank 0
    are left out. Universal: r is the next rank that vLLM serves, every layer of `factors` is padded with zeros to it,
    and both patterns are empty; pass all linears of the decoder blocks, those of rank 0 too.
    Raises EoraLabError when there is nothing to write, or when the rank is above what a universal adapter can have.
    """
    folder, ranks = Path(folder), {module: len(A) for module, (A, _) in factors.items()}
    highest = max(ranks.values(), default=0)
    if not highest:
        raise EoraLabError(f"{folder}: there is no low-rank path to write, every rank is 0")
    if universal:
        highest = served_rank(highest)
        factors = {module: pad(A, B, highest) for module, (A, B) in factors.items()}
        ranks = dict.fromkeys(ranks, highest)
    pattern = {module: rank for module, rank in ranks.items() if 0 < rank != highest}
    kept = {module: pair for module, pair in factors.items() if ranks[module]}
    alike = set(ranks.values()) == {highest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": highest,
        "lora_alpha": highest,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in kept} if alike else kept),
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    tensors = {}
    for module, (A, B) in kept.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.half()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.half()
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, config)


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


def read_files(folder: Path | str) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of an adapter folder as they stand. Raises EoraLabError when a file is missing or damaged."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = f": give {folder / 'adapter'}" if (folder / "adapter" / CONFIG).exists() else ""
        raise EoraLabError(f"{folder}: no adapter, {CONFIG} is missing{hint}") from error
    except (OSError, ValueError) as error:
        raise EoraLabError(f"{folder}: {CONFIG} cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise EoraLabError(f"{folder}: {CONFIG} is not that of a LoRA adapter (peft_type LORA)")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise EoraLabError(f"{folder}: {key} in {CONFIG} must be a number above 0, not {value!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(isinstance(v, int | float) and v > 0 for v in pattern.values()):
            raise EoraLabError(f"{folder}: {key} in {CONFIG} must name numbers above 0")
        try:
            re.compile("|".join(pattern))
        except re.error as error:
            raise EoraLabError(f"{folder}: {key} in {CONFIG} has a name that is no pattern ({error})") from error
    if not (folder / WEIGHTS).exists():
        pickled = "; pickled weights (.bin) are refused" if (folder / "adapter_model.bin").exists() else ""
        raise EoraLabError(f"{folder}: {WEIGHTS} is missing{pickled}")
    try:
        return load_file(folder / WEIGHTS), config
    except (OSError, SafetensorError) as error:
        raise EoraLabError(f"{folder}: {WEIGHTS} cannot be read ({error}): copy or download it again") from error


def pairs(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Module name -> {"A": ..., "B": ...} (one may be missing), and the keys that are neither."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if (match := KEY.fullmatch(key)) and tensor.ndim == 2:
            found.setdefault(match[1], {})[match[2]] = tensor
        else:
            unknown.append(key)
    return found, unknown


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
    """Module name -> (A, B), the scaling multiplied into B.

    Raises EoraLabError when the adapter is more than such products (DoRA, saved modules), or a half is missing.
    """
    if config.get("use_dora") or config.get("modules_to_save"):
        what = "DoRA" if config.get("use_dora") else "modules_to_save"
        raise EoraLabError(f"the adapter uses {what}, which is no low-rank product beside a weight")
    found, unknown = pairs(tensors)
    if unknown:
        raise EoraLabError(f"the adapter holds {unknown[0]}, which is no lora_A or lora_B matrix")
    if not found:
        raise EoraLabError("the adapter holds no lora_A and lora_B matrices")
    factors = {}
    for module, halves in found.items():
        if len(halves) < 2:
            raise EoraLabError(f"the adapter holds lora_{next(iter(halves))} of {module} without its other half")
        A, B = halves["A"], halves["B"]
        if len(A) != B.shape[1]:
            raise EoraLabError(f"{module}: lora_A has rank {len(A)}, lora_B {B.shape[1]}")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise EoraLabError(f"{module}: NaN or Inf in its factors")
        factor = scaling(config, module)
        factors[module] = A, B if factor == 1 else B.float() * factor
    return factors


def read_adapter(folder: Path | str) -> tuple[Factors, dict]:
    """(factors, config) of an adapter folder; see `adapter_factors`. Raises EoraLabError when it cannot be used."""
    tensors, config = read_files(folder)
    try:
        return adapter_factors(tensors, config), config
    except EoraLabError as error:
        raise EoraLabError(f"{folder}: {error}") from error
