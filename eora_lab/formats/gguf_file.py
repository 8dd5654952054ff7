"""Compressed weights written as a GGUF file: another file of the same model with other linears.

What a GGUF file holds beside weights (tokenizer, sizes, chat template) is made by llama.cpp's own converter; here it is
taken from a file that is there.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from eora_lab.compress import CodebookWeight, Compressed, GgufWeight
from eora_lab.compress.format_grids import E2M1
from eora_lab.compress.gguf_codes import LAYOUTS
from eora_lab.errors import EoraLabError
from eora_lab.files import write_atomically
from eora_lab.formats.fused import fused_linears
from eora_lab.formats.gguf_checkpoint import read_gguf_file
from eora_lab.formats.gguf_names import GgufNames, of_all_experts
from eora_lab.layer.linear import compensated

GRIDS = {  # type -> levels and scales of the codebook that is the same, and what its codes differ by
    "Q4_0": (torch.arange(16.0) - 8, torch.float16, 0),
    "Q8_0": (torch.arange(256, dtype=torch.uint8).view(torch.int8).float(), torch.float16, 128),
    "MXFP4": (E2M1, torch.float8_e8m0fnu, 0),
}
SPLIT = "split."


def write_gguf(path: Path | str, model: nn.Module, *_others: object, like: Path | str) -> str:
    """Write the compressed linears of a model, without their low-rank path. Returns the types written, in words.

    like: a GGUF file of the same model, for all else, which includes the tokenizer.
    Raises EoraLabError when the model is not compressed, when a weight is stored in a way that GGUF does not know, and
    when `like` has no place for a linear.
    """
    import gguf

    path, like = Path(path), Path(like)
    blocks = _by_tensor(model)
    reader, own = read_gguf_file(like), GgufNames(model).architecture
    if (architecture := reader.fields["general.architecture"].contents()) != own:
        raise EoraLabError(f"{like} is of another model: of architecture {architecture}, and this is {own}")
    kinds: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
    if strangers := [name for name in blocks if name not in kinds]:
        raise EoraLabError(f"{like} has no tensor {strangers[0]}: it is of another model, or one part of several")
    for name, (_, _, shape) in blocks.items():
        if (there := tuple(int(n) for n in kinds[name].shape)) != shape:
            raise EoraLabError(f"{like} is of another model: its {name} is {there}, not {shape}")
    types = sorted({kind for _, kind, _ in blocks.values()})

    def write(partial: Path) -> None:
        writer = gguf.GGUFWriter(partial, architecture)
        for key, field in reader.fields.items():
            known = key.startswith(("GGUF.", SPLIT)) or key in ("general.architecture", "general.file_type")
            if not known:
                inner = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], inner)
        if (one := getattr(gguf.LlamaFileType, f"MOSTLY_{types[0]}", None)) is not None and len(types) == 1:
            writer.add_file_type(one)
        for tensor in reader.tensors:
            data, kind = tensor.data, tensor.tensor_type
            if tensor.name in blocks:
                data, kind = blocks[tensor.name][0], gguf.GGMLQuantizationType[blocks[tensor.name][1]]
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(path, write)
    return f"GGUF {', '.join(types)} in {len(blocks)} tensors, all else as in {like.name}"


def _by_tensor(model: nn.Module) -> dict[str, tuple[np.ndarray, str, tuple[int, ...]]]:
    """Name of a tensor -> its blocks, type, and shape as GGUF counts it, of all compressed linears."""
    modules, names = compensated(model), GgufNames(model)
    found: dict[str, tuple[np.ndarray, str, tuple[int, ...]]] = {}
    if not modules:
        raise EoraLabError("this model is not compressed: give a run folder")
    fused = fused_linears(model)
    experts = {name for each in fused for name in each.names()}
    for module, layer in modules.items():
        if module not in experts:
            blocks, kind = blocks_of(module, layer.compressed)
            name = names.of(module)
            shape = (layer.in_features, layer.out_features)
            found[f"{name}.weight"] = names.permuted(name, blocks).contiguous().numpy(), kind, shape
    for each in fused:
        if not (own := [name for name in each.names() if name in modules]):
            continue
        if len(own) < len(each.names()):
            raise EoraLabError(f"{own[0]} is compressed and not all experts beside it: a GGUF file holds them as one")
        stored = [blocks_of(name, modules[name].compressed) for name in own]
        if len({kind for _, kind in stored}) > 1:
            raise EoraLabError(
                f"{own[0]} and the experts beside it are of several types: a GGUF file holds them as one"
            )
        for place, (part, _) in enumerate(each.parts[0]):
            stacked = torch.stack([b[parts[place][1]] for (b, _), parts in zip(stored, each.parts, strict=True)])
            size = (modules[own[0]].in_features, stacked.shape[1], len(own))
            found[f"{names.of(of_all_experts(part))}.weight"] = stacked.contiguous().numpy(), stored[0][1], size
    return found


def blocks_of(name: str, weight: Compressed) -> tuple[UInt8[Tensor, "out bytes"], str]:
    """The rows of a weight as blocks of a GGUF type, and the type. Raises EoraLabError where no type is the same."""
    if isinstance(weight, GgufWeight) and weight.scales is None:
        return weight.blocks.cpu(), weight.type
    if isinstance(weight, CodebookWeight) and weight.group_size == 32 and weight.shape[1] % 32 == 0:
        for kind, (levels, dtype, flip) in GRIDS.items():
            if weight.scales.dtype == dtype and weight.levels.shape == levels.shape and weight.levels.equal(levels):
                scales = weight.scales.cpu().contiguous().view(torch.uint8).reshape(-1, dtype.itemsize)
                layout, codes = LAYOUTS[kind], (weight.codes.cpu() ^ flip).numpy()
                blocks = np.zeros((len(scales), layout.block_bytes), np.uint8)
                blocks[:, : dtype.itemsize] = scales.numpy()
                return torch.from_numpy(layout.with_codes(blocks.reshape(len(codes), -1), codes)), kind
    raise EoraLabError(
        f"{name} is stored as {weight.kind}, and no GGUF type holds that: mend a GGUF file, or compress with one of "
        f"--grid {' '.join(kind.lower() for kind in GRIDS)}"
    )
