"""GPTQ checkpoints, whole folders: codes beside the tensors that stay dense, in safetensors, with two JSON files."""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eora_lab.compress import GridWeight
from eora_lab.errors import EoraLabError, naming
from eora_lab.formats.checkpoint import Checkpoint, json_object, quantization
from eora_lab.formats.dense import compressed_linears, dense_tensors, write_model_folder
from eora_lab.formats.gptq import TENSORS, read_linear, write_linear
from eora_lab.formats.gptq_config import GptqConfig, stated, unquantised
from eora_lab.model.experts import fuse
from eora_lab.model.structure import block_linears, model_name

SAME = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
CONFIG = "quantize_config.json"
ROUNDING = 0.05  # relative distance of a dense tensor that 16 bits explain many times over


def is_gptq(folder: Path) -> bool:
    """Whether a folder says that it was quantised so; quantize_config.json need not name it, as no other had that."""
    alone = json_object(folder / CONFIG)
    said = quantization(folder) | alone
    return str(said.get("quant_method") or said.get("method") or (alone and "gptq")).lower() == "gptq"


class GptqCheckpoint(Checkpoint):
    """The quantised linears of a GPTQ checkpoint folder: module name -> W^, read from the files when asked for.

    One safetensors file or several; configuration in quantize_config.json or config.json.
    Raises EoraLabError when the folder is no such checkpoint, is incomplete or damaged, or of a kind that is not read;
    reading a linear does so when a tensor of it is missing or damaged.
    """

    def __init__(self, folder: Path | str):
        self.path = Path(folder)
        self.model_config = json_object(self.path / "config.json")
        self.config = self._read_config()
        self._files = self._read_headers()
        self._names = sorted(key.removesuffix(".qweight") for key in self._files if key.endswith(".qweight"))
        if not self._names:
            raise EoraLabError(
                f"{folder} is no GPTQ checkpoint: no tensor in it is named qweight; if its weights are dense, delete "
                "quantization_config from its config.json, and quantize_config.json, and use it as a model"
            )

    def __contains__(self, name: object) -> bool:
        return f"{name}.qweight" in self._files

    def __getitem__(self, name: str) -> GridWeight:
        if name not in self:
            raise KeyError(name)
        found = {key: self.tensor(f"{name}.{key}") for key in TENSORS if f"{name}.{key}" in self._files}
        with naming(str(self.path)):
            return read_linear(found, self.config, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def base(self) -> str:
        """How the weights were compressed, in short."""
        return f"GPTQ {self.config.bits}-bit g{self.config.group_size}"

    def tensor(self, key: str) -> Shaped[Tensor, "..."]:
        """Any tensor of the files."""
        try:
            with safe_open(self.path / self._files[key], framework="pt") as file:
                return file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise EoraLabError(f"cannot read {key} in {self.path}: {error}") from error

    def check_model(self, model: nn.Module) -> None:
        """Raise EoraLabError unless this can be a checkpoint of `model`, by all but the codes themselves.

        Compared are the sizes in config.json, the names of linears, and the tensors that are not quantised.
        """
        original = model_name(model) or "the given model"
        for key in SAME:
            ours, theirs = self.model_config.get(key), getattr(model.config, key, None)
            if None not in (ours, theirs) and ours != theirs:
                raise EoraLabError(
                    f"{self.path} was not made from {original}: its {key} is {ours}, that of the model {theirs}"
                )
        linears = block_linears(model)
        for name in self._names:
            if name not in linears:
                raise EoraLabError(
                    f"{self.path} quantises {name}, which is no linear layer in the decoder blocks of {original}"
                )
        state = model.state_dict()
        for name in self._names:  # some tools write a bias of zeros for every linear
            bias = f"{name}.bias"
            if bias in self._files and bias not in state and self.tensor(bias).any():
                raise EoraLabError(f"{self.path} was not made from {original}: the model has no {bias}")
        stored = {tensor.data_ptr() for key, tensor in state.items() if key in self._files}  # tied: under one name
        for key, tensor in state.items():
            module, kind = key.rpartition(".")[::2]
            if key not in self._files and tensor.data_ptr() not in stored and not (module in self and kind == "weight"):
                raise EoraLabError(f"{self.path} lacks the tensor {key} of {original}")
        for key in filter(self._files.__contains__, state):
            ours, theirs = self.tensor(key), state[key].float()
            if ours.shape != theirs.shape:
                raise EoraLabError(
                    f"{self.path} was not made from {original}: {key} is {tuple(ours.shape)}, in the model "
                    f"{tuple(theirs.shape)}"
                )
            if not (ours.to(theirs) - theirs).norm() <= ROUNDING * theirs.norm():
                raise EoraLabError(f"{self.path} was not made from {original}: the values of {key} differ")

    def _read_config(self) -> GptqConfig:
        """What quantize_config.json and config.json say; each may leave out what the other says."""
        inner, alone = quantization(self.path), json_object(self.path / CONFIG)
        if not (alone or inner):
            raise EoraLabError(
                f"{self.path} is no GPTQ checkpoint: it has neither quantize_config.json nor a quantization_config "
                "in config.json"
            )
        with naming(str(self.path)):
            first, second = stated(alone), stated(inner)
            for key in first.keys() & second.keys():
                if first[key] != second[key]:
                    raise EoraLabError(
                        f"{key} is {first[key]!r} in quantize_config.json and {second[key]!r} in config.json: correct "
                        "the wrong one"
                    )
        said = {key: value for key, value in alone.items() if value is not None}
        return GptqConfig.from_dict(inner | said, str(self.path))

    def _read_headers(self) -> dict[str, str]:
        """Tensor name -> file name."""
        indices = sorted(self.path.glob("*.safetensors.index.json"))
        listed: dict[str, str] = {}
        for index in indices:
            weight_map = json_object(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise EoraLabError(f"{index} has no weight_map: copy or download it again")
            for key, name in weight_map.items():
                if not isinstance(name, str):
                    raise EoraLabError(f"{index}: weight_map must name a file for {key}, not {name!r}")
            listed |= weight_map
        names = set(listed.values()) if indices else {path.name for path in self.path.glob("*.safetensors")}
        if not names:
            raise EoraLabError(f"{self.path} has no safetensors weights; pickled ones (.bin, .pt) are not read")
        files: dict[str, str] = {}
        for name in sorted(names):
            try:
                with safe_open(self.path / name, framework="pt") as file:
                    files |= dict.fromkeys(file.keys(), name)
            except (OSError, SafetensorError) as error:
                raise EoraLabError(
                    f"{self.path / name} is missing or damaged ({error}): copy or download it again"
                ) from error
        for key, name in listed.items():
            if key not in files:
                raise EoraLabError(f"{self.path / name} lacks the tensor {key}: copy or download it again")
        return files


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
    write_model_folder(folder, model, tokenizer, tensors, dtype, about, beside="quantize_config.json")
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
