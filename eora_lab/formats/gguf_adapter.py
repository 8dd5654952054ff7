"""LoRA adapters as GGUF files, for llama.cpp (`--lora`) and what is built on it.

A tensor T of the base has `T.lora_a` (rank, in) and `T.lora_b` (out, rank), experts (experts, rank, in) and
(experts, out, rank); every tensor has its own rank. `adapter.lora.alpha` is left out: the scale is then 1, whatever the
rank. What the conversion of the base does with rows of a weight is done with those of B.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.errors import EoraLabError
from eora_lab.files import write_atomically
from eora_lab.formats.fused import Fused, fused_linears
from eora_lab.formats.names import Factors
from eora_lab.formats.peft_experts import of_one_rank


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's conversion treats a model type.

    name:     `general.architecture` of the base, without which an adapter is refused.
    permuted: q and k have their rows in the order that its rotary embedding wants.
    """

    name: str
    permuted: bool = False


LLAMA = Architecture("llama", permuted=True)
ARCHITECTURES = {  # model_type -> those whose conversion keeps all other linears as they are
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "gpt_oss": Architecture("gpt-oss"),
    "olmoe": Architecture("olmoe"),
}


def write_gguf_adapter(path: Path | str, factors: Factors, model: nn.Module) -> None:
    """Write factors by this package's names, as float32; those of rank 0 are left out.

    model: that they belong to, for its architecture and names; without weights will do (`load_skeleton`).
    Raises EoraLabError for a model type whose conversion is not known, a layer that has no place in a GGUF file, and
    when every rank is 0.
    """
    import gguf

    path, tensors = Path(path), {}
    for name, A, B in gguf_factors(factors, model):
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = _array(A), _array(B)
    if not tensors:
        raise EoraLabError(f"{path}: there is no low-rank path to write, every rank is 0")

    def write(partial: Path) -> None:
        writer = gguf.GGUFWriter(partial, architecture_of(model).name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        for name, array in tensors.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(path, write)


def architecture_of(model: nn.Module) -> Architecture:
    """What llama.cpp calls a model. Raises EoraLabError where that is not known."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in ARCHITECTURES:
        raise EoraLabError(
            f"no GGUF adapter of a {kind} model: known are {', '.join(ARCHITECTURES)}; write a PEFT adapter, and let "
            "llama.cpp's convert_lora_to_gguf.py convert it"
        )
    return ARCHITECTURES[kind]


def gguf_factors(
    factors: Factors, model: nn.Module
) -> Iterator[tuple[str, Float[Tensor, "*experts rank in"], Float[Tensor, "*experts out rank"]]]:
    """(name of the tensor in the base, A, B) of all pairs above rank 0, with the rows of B in its order.

    Raises EoraLabError as `write_gguf_adapter`.
    """
    import gguf

    architecture = architecture_of(model)
    config: Any = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def name_of(module: str) -> str:
        if (name := known.get_name(module)) is None:
            raise EoraLabError(f"{module} has no place in a GGUF file of {architecture.name}")
        return name

    fused = fused_linears(model)
    experts = {name for each in fused for name in each.names()}
    for module, (A, B) in factors.items():
        if module not in experts and len(A):
            name = name_of(module)
            count = heads.get(name.rpartition(".")[2]) if architecture.permuted else None
            yield f"{name}.weight", A, B if count is None else _permuted(B, count)
    for each in fused:
        for module, A, B in _stacked(factors, each):
            yield f"{name_of(module)}.weight", A, B


def _stacked(factors: Factors, fused: Fused) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name without the number of an expert, A, B) of all experts, at the highest of their ranks."""
    if not (pairs := of_one_rank(factors, fused)):
        return
    A = torch.stack([A for A, _ in pairs])
    for place, (name, _) in enumerate(fused.parts[0]):
        B = torch.stack([B[parts[place][1]] for (_, B), parts in zip(pairs, fused.parts, strict=True)])
        yield re.sub(r"\.\d+\.([^.]+)$", r".\1", name), A, B


def _permuted(B: Float[Tensor, "out rank"], heads: int) -> Float[Tensor, "out rank"]:
    """Rows of each head in pairs, the first half's beside the second half's."""
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().contiguous().cpu().numpy()
