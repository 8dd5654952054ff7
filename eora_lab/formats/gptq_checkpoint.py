"""GPTQ checkpoints, whole folders: codes beside the tensors that stay dense, in safetensors, with two JSON files."""

from pathlib import Path

import torch
from torch import nn

from eora_lab.compress import GridWeight
from eora_lab.errors import EoraLabError, naming
from eora_lab.formats.checkpoint import json_object, quantization
from eora_lab.formats.dense import compressed_linears, dense_tensors, write_model_folder
from eora_lab.formats.gptq import TENSORS, read_linear, write_linear
from eora_lab.formats.gptq_config import GptqConfig, stated, unquantised
from eora_lab.formats.quantised_folder import QuantisedFolder
from eora_lab.model.experts import fuse

CONFIG = "quantize_config.json"


def is_gptq(folder: Path) -> bool:
    """Whether a folder says that it was quantised so; quantize_config.json need not name it, as no other had that."""
    alone = json_object(folder / CONFIG)
    said = quantization(folder) | alone
    return str(said.get("quant_method") or said.get("method") or (alone and "gptq")).lower() == "gptq"


class GptqCheckpoint(QuantisedFolder):
    """The quantised linears of a GPTQ checkpoint folder; configuration in quantize_config.json or config.json."""

    format = "GPTQ"
    tensors = TENSORS

    @property
    def base(self) -> str:
        """How the weights were compressed, in short."""
        return f"GPTQ {self.config.bits}-bit g{self.config.group_size}"

    def configure(self) -> None:
        """What quantize_config.json and config.json say; each may leave out what the other says."""
        inner, alone = self.said, json_object(self.path / CONFIG)
        if not (alone or inner):
            raise EoraLabError(
                "this is no GPTQ checkpoint: it has neither quantize_config.json nor a quantization_config in "
                "config.json"
            )
        first, second = stated(alone), stated(inner)
        for key in first.keys() & second.keys():
            if first[key] != second[key]:
                raise EoraLabError(
                    f"{key} is {first[key]!r} in quantize_config.json and {second[key]!r} in config.json: correct "
                    "the wrong one"
                )
        self.config = GptqConfig.from_dict(inner | {key: value for key, value in alone.items() if value is not None})

    def read(self, name: str) -> GridWeight:
        """W^ of one linear."""
        found = {key: self.tensor(f"{name}.{key}") for key in TENSORS if self.has(f"{name}.{key}")}
        with naming(str(self.path)):
            return read_linear(found, self.config, name)


def write_checkpoint(
    folder: Path | str, model: nn.Module, tokenizer, dtype: torch.dtype = torch.float16, checkpoint_format: str = "gptq"
) -> GptqConfig:
    """Write a compressed model as a GPTQ checkpoint, without its low-rank path. Returns the configuration.

    dtype: of the tensors that are not quantised; linears among them are named in the configuration.
    checkpoint_format: "gptq", which every loader knows but cannot hold a zero point of 0, or "gptq_v2".
    Raises EoraLabError when the model is not compressed, on compressed experts, and on grids that the format cannot
    say, with what to do.
    """
    tensors, weights = dense_tensors(model, dtype), {}
    fuse(model, tensors)
    for name, weight in compressed_linears(model, "GPTQ checkpoint").items():
        if not isinstance(weight, GridWeight):
            raise EoraLabError(
                f"{name} is stored as {weight.kind}, and a GPTQ checkpoint holds grids: use format compressed-tensors "
                "or dense"
            )
        weights[name] = weight
        linear = write_linear(weight, checkpoint_format, name)
        tensors |= {f"{name}.{key}": tensor for key, tensor in linear.items()}
    config = config_of(weights, checkpoint_format)
    head = model.get_output_embeddings()  # type: ignore[operator]
    left = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head]
    about = config.to_dict() | unquantised(left, weights)
    write_model_folder(folder, model, tokenizer, tensors, dtype, about, beside=CONFIG)
    return config


def config_of(weights: dict[str, GridWeight], checkpoint_format: str) -> GptqConfig:
    """The configuration that says how these are stored. Raises EoraLabError when one cannot say it of all."""
    one_group = all(weight.scales.shape[1] == 1 for weight in weights.values())
    kinds: dict[tuple[int, int], str] = {}
    for name, weight in weights.items():
        largest = weight.group_size if weight.g_idx is None else int(weight.g_idx.bincount().max())
        kinds.setdefault((weight.bits, -1 if one_group else largest), name)
    if len(kinds) > 1:
        (first, one), (second, other) = list(kinds.items())[:2]
        raise EoraLabError(
            f"a GPTQ checkpoint has one number of bits and one group size, but {one} has {first} and {other} {second}"
        )
    ((bits, group_size),) = kinds
    sym = all(bool((weight.offsets == 2 ** (bits - 1)).all()) for weight in weights.values())
    desc_act = any(weight.g_idx is not None for weight in weights.values())
    return GptqConfig(bits, group_size, sym, desc_act, checkpoint_format)
