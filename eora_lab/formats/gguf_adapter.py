"""LoRA adapters as GGUF files, for llama.cpp (`--lora`) and what is built on it.

A tensor T of the base has `T.lora_a` (rank, in) and `T.lora_b` (out, rank), experts (experts, rank, in) and
(experts, out, rank); every tensor has its own rank. `adapter.lora.alpha` is left out: the scale is then 1, whatever the
rank. What the conversion of the base does with rows of a weight is done with those of B.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.errors import EoraLabError
from eora_lab.files import write_atomically
from eora_lab.formats.fused import Fused, fused_linears
from eora_lab.formats.gguf_names import GgufNames, of_all_experts
from eora_lab.formats.names import Factors
from eora_lab.formats.peft_experts import of_one_rank


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
        writer = gguf.GGUFWriter(partial, GgufNames(model).architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        for name, array in tensors.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(path, write)


def gguf_factors(
    factors: Factors, model: nn.Module
) -> Iterator[tuple[str, Float[Tensor, "*experts rank in"], Float[Tensor, "*experts out rank"]]]:
    """(name of the tensor in the base, A, B) of all pairs above rank 0, with the rows of B in its order.

    Raises EoraLabError as `write_gguf_adapter`.
    """
    names = GgufNames(model)
    fused = fused_linears(model)
    experts = {name for each in fused for name in each.names()}
    for module, (A, B) in factors.items():
        if module not in experts and len(A):
            name = names.of(module)
            yield f"{name}.weight", A, names.permuted(name, B)
    for each in fused:
        for module, A, B in _stacked(factors, each):
            yield f"{names.of(module)}.weight", A, B


def _stacked(factors: Factors, fused: Fused) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name without the number of an expert, A, B) of all experts, at the highest of their ranks."""
    if not (pairs := of_one_rank(factors, fused)):
        return
    A = torch.stack([A for A, _ in pairs])
    for place, (name, _) in enumerate(fused.parts[0]):
        B = torch.stack([B[parts[place][1]] for (_, B), parts in zip(pairs, fused.parts, strict=True)])
        yield of_all_experts(name), A, B


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().contiguous().cpu().numpy()
