"""Model folders that transformers loads: dense weights, whatever they were compressed to."""

import json
import shutil
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from eora_lab.compress import Compressed
from eora_lab.errors import EoraLabError, one_line
from eora_lab.files import write_folder, write_json
from eora_lab.layer.linear import compensated
from eora_lab.model.experts import fuse, mixtures
from eora_lab.model.gguf import quiet_transformers
from eora_lab.model.load import local_path
from eora_lab.model.structure import model_name


def write_dense(
    folder: Path | str, model: nn.Module, tokenizer, dtype: torch.dtype = torch.float16, merge: bool = False
) -> str:
    """Write a compressed model with W^ in full, or W^ + B A if merged, in the place of every compressed linear.

    Pruned weights are zeros in the file, unless the low-rank path is merged, which fills them again.
    Returns what was written. Raises EoraLabError when weights do not fit the dtype, or the folder is taken.
    """
    tensors = dense_tensors(model, dtype)
    for name, module in compensated(model).items():
        weight = module.compressed.dense()
        if merge:
            A, B = module.factors.dense()
            weight = weight + B @ A
        weight = weight.T.contiguous() if module.transposed else weight
        tensors[f"{name}.weight"] = to_dtype(weight, dtype, f"{name}.weight")
    fuse(model, tensors)
    write_model_folder(folder, model, tokenizer, tensors, dtype)
    return f"dense weights, {'with' if merge else 'without'} the low-rank path"


def dense_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """All parameters but the weights of compressed linears. Tied tensors stay one tensor under two names."""
    compressed = compensated(model)
    converted: dict[int, Tensor] = {}
    tensors = {}
    for key, tensor in model.state_dict().items():
        module, kind = key.rpartition(".")[::2]
        if module in compressed and kind != "bias":
            continue
        if tensor.data_ptr() not in converted:
            converted[tensor.data_ptr()] = to_dtype(tensor, dtype, key)
        tensors[key] = converted[tensor.data_ptr()]
    return tensors


def compressed_linears(model: nn.Module, what: str) -> dict[str, Compressed]:
    """Module name -> W^ of every compressed linear, for a checkpoint of packed weights.

    what: kind of checkpoint. Raises EoraLabError when the model is not compressed, and on compressed experts.
    """
    modules = compensated(model)
    if not modules:
        raise EoraLabError("this model is not compressed: give a run folder")
    for name in modules:
        if any(name.startswith(f"{prefix}.") for prefix in mixtures(model)):
            raise EoraLabError(
                f"{name} is of an expert, and no {what} of experts is written here: use format dense or merged, or "
                'compress without them (--skip "[.]experts[.]")'
            )
    return {name: module.compressed for name, module in modules.items()}


def to_dtype(tensor: Shaped[Tensor, "*shape"], dtype: torch.dtype, name: str) -> Shaped[Tensor, "*shape"]:
    """Convert; raises EoraLabError when values overflow."""
    converted = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
    if not torch.isfinite(converted).all():
        raise EoraLabError(f"{name} does not fit {str(dtype).removeprefix('torch.')}: use bfloat16 or float32")
    return converted


def _processors(model: nn.Module) -> list[Path]:
    """Files of the original's folder that say how pictures and sound become tensors."""
    try:
        return sorted(local_path(model_name(model), fetch=False, weights=False).glob("*processor*.json"))
    except EoraLabError:
        return []


def write_model_folder(
    folder: Path | str,
    model: nn.Module,
    tokenizer,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    quantization: dict | None = None,
    beside: str = "",
) -> None:
    """Write tensors in the files of `model`'s architecture, with its configuration and tokenizer, all or nothing.

    quantization: how weights are quantised, for config.json. beside: another file that says so.
    """

    def write(partial: Path) -> None:
        try:
            with quiet_transformers():
                model.save_pretrained(partial, state_dict=tensors, max_shard_size="5GB")  # type: ignore[operator]
                tokenizer.save_pretrained(partial)
            for path in _processors(model):
                shutil.copy(path, partial)
        except (RuntimeError, ValueError, KeyError) as error:
            raise EoraLabError(f"transformers cannot write this model: {one_line(error)}") from error
        path = partial / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        if quantization:
            config["quantization_config"] = quantization
        if quantization and beside:
            write_json(partial / beside, quantization)
        write_json(path, config)

    write_folder(Path(folder), write)
