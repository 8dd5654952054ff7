"""LoRA adapters for MLX (mlx-lm, and what is built on it): `adapter_config.json` and `adapters.safetensors`.

A linear has `lora_a` (in, rank) and `lora_b` (rank, out), and adds scale * (x lora_a) lora_b; those of all experts have
(experts, rank, in) and (experts, out, rank). One rank and one scale hold for all: factors are padded with zeros, the
scale is 1. Every linear that one of `keys` names, in every block, gets factors, random ones where the file has none.
As `load_adapters` of mlx-lm 0.32 has it (mlx_lm/tuner/utils.py, lora.py).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.errors import EoraLabError
from eora_lab.files import write_folder, write_json, write_safetensors
from eora_lab.formats.adapter_config import CONFIG
from eora_lab.formats.fused import Fused, fused_linears
from eora_lab.formats.made_for import MadeFor
from eora_lab.formats.names import Factors
from eora_lab.formats.peft import in_half, pad
from eora_lab.formats.peft_experts import of_one_rank

WEIGHTS = "adapters.safetensors"
BLOCK = re.compile(r"(.*?\.\d+)\.(.+)")  # a decoder block, and what lies in it


@dataclass(frozen=True)
class Names:
    """What mlx-lm calls the parts of a model type, where it has other names than transformers.

    mixture: the module with experts in a block.
    experts: the module within it that holds the linears of all experts.
    """

    mixture: str = "mlp"
    experts: str = "switch_mlp"


SAME = Names()
MODELS = {  # model_type -> those whose other linears have the names that they have in transformers
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), SAME),
    **dict.fromkeys(("granite", "olmo2", "phi3", "smollm3", "starcoder2"), SAME),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), SAME),
    "mixtral": Names(mixture="block_sparse_moe"),
    "gpt_oss": Names(experts="experts"),
}
LEAVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # linears of an expert


def write_mlx_adapter(
    folder: Path | str, factors: Factors, base_model: str, model: nn.Module, made_for: MadeFor | None = None
) -> None:
    """Write an adapter folder, in float16, at the highest rank of all.

    model:    that factors belong to, for its names; without weights will do (`load_skeleton`).
    made_for: which compressed weights it belongs to.
    Raises EoraLabError for a folder that is not empty, a model type or experts whose names in mlx-lm are not known
    here, factors that do not fit float16, and when every rank is 0.
    """
    folder, highest = Path(folder), max((len(A) for A, _ in factors.values()), default=0)
    if not highest:
        raise EoraLabError(f"{folder}: there is no low-rank path to write, every rank is 0")
    config: Any = model.config
    factors = {module: in_half(A, B, module) if len(A) else (A.half(), B.half()) for module, (A, B) in factors.items()}
    tensors: dict[str, Tensor] = {}
    keys: set[str] = set()
    for name, A, B in mlx_factors({module: pad(A, B, highest) for module, (A, B) in factors.items()}, model):
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = A, B
        if B.any():
            keys.add(within_block(name))
    tensors = {key: one for key, one in tensors.items() if within_block(key.rpartition(".")[0]) in keys}
    about = {
        "fine_tune_type": "lora",
        "model": base_model,
        "num_layers": config.num_hidden_layers,
        "lora_parameters": {"rank": highest, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }

    def write(partial: Path) -> None:
        metadata = {"format": "mlx"} | (made_for.metadata() if made_for else {})
        write_safetensors(partial / WEIGHTS, tensors, metadata)
        write_json(partial / CONFIG, about)

    write_folder(folder, write)


def within_block(module: str) -> str:
    """What a module is called within its decoder block, as `keys` has it."""
    return match[2] if (match := BLOCK.fullmatch(module)) else module


def mlx_names(model: nn.Module) -> Names:
    """What mlx-lm calls the parts of a model. Raises EoraLabError where that is not known."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in MODELS:
        raise EoraLabError(f"the names of a {kind} model in mlx-lm are not known here: known are {', '.join(MODELS)}")
    return MODELS[kind]


def mlx_factors(
    factors: Factors, model: nn.Module
) -> Iterator[tuple[str, Float[Tensor, "*experts left right"], Float[Tensor, "*experts left right"]]]:
    """(module, lora_a, lora_b) as the file has them, of pairs of one rank. Raises as `write_mlx_adapter`."""
    names, fused = mlx_names(model), fused_linears(model)
    experts = {name for each in fused for name in each.names()}
    for module, (A, B) in factors.items():
        if module not in experts:
            yield module.replace(".mlp.", f".{names.mixture}."), A.T, B.T
    for each in fused:
        yield from _stacked(factors, each, names)


def _stacked(factors: Factors, fused: Fused, names: Names) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, A, B) of one kind of linear of all experts."""
    if not (pairs := of_one_rank(factors, fused)):
        return
    leaves, holder = LEAVES.get(fused.leaf), fused.module.rpartition(".")[0].rpartition(".")[0]
    if leaves is None or len(leaves) != len(fused.parts[0]):
        raise EoraLabError(f"what {fused.module} is called in mlx-lm is not known here: leave experts out (--skip)")
    A = torch.stack([A for A, _ in pairs])
    for place, leaf in enumerate(leaves):
        B = torch.stack([B[parts[place][1]] for (_, B), parts in zip(pairs, fused.parts, strict=True)])
        yield f"{holder}.{names.mixture}.{names.experts}.{leaf}", A.clone(), B
