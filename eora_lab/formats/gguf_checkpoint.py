"""GGUF files, llama.cpp's: W^ in any type that the package `gguf` can read, with the bytes as they are.

The file is mapped into memory, and read a tensor at a time. Linears that it holds unquantised are not compressed: they
stay as they are in the original.
"""

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.compress import Compressed, GgufWeight
from eora_lab.compress.gguf_weight import dequantises
from eora_lab.errors import EoraLabError, one_line
from eora_lab.formats.checkpoint import Checkpoint, Lazy
from eora_lab.formats.fused import fused_linears
from eora_lab.formats.gguf_names import GgufNames, of_all_experts
from eora_lab.formats.joined import joined
from eora_lab.model.experts import mixtures
from eora_lab.model.structure import block_linears, linear_at, model_name

PLAIN = ("F32", "F16", "BF16")
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
ROUNDING = 0.05  # relative distance of an unquantised tensor that 16 bits explain many times over
UNRELATED = 0.9  # of a quantised one: that of other weights of the same size is sqrt(2)
ROWS = 256  # of a matrix beside the quantised linears that are looked at
SIZES = {  # keys of the file -> the model's
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}

Part = tuple[str, slice]  # name of a linear in the file, and the rows of the model's linear that it has


def is_gguf(path: Path) -> bool:
    """Whether it is a GGUF file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"


class GgufCheckpoint(Checkpoint):
    """The quantised linears in the blocks of a GGUF file: name -> W^, its rows in the order of the file.

    Names are those of tensors without `.weight`; of experts with the expert's number (`blk.0.ffn_up_exps.3`). The first
    file of several stands for all of them.
    Raises EoraLabError when it is no GGUF file of a model, is damaged or incomplete, or has a type that cannot be read.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        readers = [read_gguf_file(file) for file in self.files]
        self._fields = readers[0].fields
        if (kind := self._said("general.type", "model")) != "model":
            raise EoraLabError(f"{path} is the GGUF file of a {kind}, not of a model")
        self._tensors: dict[str, Any] = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        if (told := self._said("split.tensors.count", len(self._tensors))) != len(self._tensors):
            raise EoraLabError(
                f"{path} and its other parts hold {len(self._tensors)} tensors of {told}: get them again"
            )
        names: list[str] = []
        for key, tensor in self._tensors.items():
            name, suffix = key.rpartition(".")[::2]
            if not key.startswith("blk.") or suffix != "weight" or self._type(key) in PLAIN or len(tensor.shape) < 2:
                continue
            if not dequantises(self._type(key)):
                raise EoraLabError(
                    f"{path}: {key} is of type {self._type(key)}, which gguf {metadata.version('gguf')} cannot "
                    "dequantise: quantise the model to another type"
                )
            experts = range(int(tensor.shape[-1])) if len(tensor.shape) == 3 else [None]
            names += [name if index is None else f"{name}.{index}" for index in experts]
        self._names = dict.fromkeys(names)
        if not names:
            raise EoraLabError(f"{path} holds no quantised weights in blocks: it can be used as a model")

    @property
    def files(self) -> list[Path]:
        """The file; all parts of a model that is split into several, which must lie beside it."""
        if not (split := SHARD.search(self.path.name)):
            return [self.path]
        stem, count = self.path.name[: split.start()], int(split[1])
        return [self.path.with_name(f"{stem}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]

    @property
    def base(self) -> str:
        """The type that most weights have, in llama.cpp's word for the mixture where that begins with it."""
        import gguf

        count: Counter[str] = Counter()
        for name in self._names:
            count[self._type(self._place(name)[0])] += 1
        most = count.most_common(1)[0][0]
        said = {one.value: one.name.removeprefix("MOSTLY_") for one in gguf.LlamaFileType}
        mixture = said.get(self._said("general.file_type", -1), "")
        return f"GGUF {mixture if mixture.startswith(most) else most}"

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> GgufWeight:
        key, expert = self._place(name)
        data, scale = self._tensors[key].data, self._tensors.get(f"{key.removesuffix('.weight')}.scale")
        blocks = torch.from_numpy(np.array(data if expert is None else data[expert]).view(np.uint8))
        if scale is None:
            return GgufWeight(blocks, self._type(key))
        factor = torch.from_numpy(np.array(scale.data, np.float32)).flatten()[expert or 0]
        return GgufWeight(blocks, self._type(key), factor.expand(len(blocks), 1).contiguous())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def of(self, model: nn.Module) -> Mapping:
        """module name -> W^, with its rows in the model's order. Raises EoraLabError as `check_model`."""
        names, original = GgufNames(model), model_name(model) or "the given model"
        self._check_sizes(names, model, original)
        parts = self._parts(names, model)
        for module, own in parts.items():
            for name, _ in own:
                key, expert = self._place(name)
                if key not in self._tensors:
                    raise EoraLabError(f"{self.path} lacks the tensor {key}, {module} of {original}")
                if expert is not None and expert >= self._tensors[key].shape[-1]:
                    raise EoraLabError(f"{self.path} was not made from {original}: {key} has no expert {expert}")
        known = self._names.keys()
        parts = {module: own for module, own in parts.items() if any(name in known for name, _ in own)}
        self._check_shapes(model, parts, original)
        if strangers := known - {name for own in parts.values() for name, _ in own}:
            raise EoraLabError(f"{self.path} holds {min(strangers)}, for which {original} has no linear")
        self._check_others(names, model, parts, original)
        return Lazy({module: partial(self._linear, names, own) for module, own in parts.items()})

    def check_model(self, model: nn.Module) -> None:
        """Raise EoraLabError unless this can be a file of `model`, by all but the codes themselves.

        Compared are the architecture, sizes, the names of tensors, and the values of those that are no linear.
        """
        self.of(model)

    def _parts(self, names: GgufNames, model: nn.Module) -> dict[str, list[Part]]:
        """Module name -> what it is made of, for all linears that a file has."""
        found: dict[str, list[Part]] = {}
        fused = fused_linears(model)
        experts = {name for each in fused for name in each.names()}
        for module in block_linears(model):
            if module not in experts and (name := names.find(module)):
                found[module] = [(name, slice(None))]
        for each in fused:
            for index, (module, parts) in enumerate(zip(each.names(), each.parts, strict=True)):
                found[module] = [(f"{names.of(of_all_experts(part))}.{index}", rows) for part, rows in parts]
        return found

    def _linear(self, names: GgufNames, parts: list[Part]) -> Compressed:
        """W^ of a linear of the model."""
        return joined([(partial(self._in_order, names, name), rows) for name, rows in parts])

    def _in_order(self, names: GgufNames, name: str) -> GgufWeight:
        """W^ of a linear of the file, with its rows in the model's order."""
        weight = self[name]
        return replace(weight, blocks=names.restored(name, weight.blocks))

    def _check_sizes(self, names: GgufNames, model: nn.Module, original: str) -> None:
        """Raise EoraLabError when the file is of another architecture or size."""
        ours = self._said("general.architecture", "")
        if ours != names.architecture:
            raise EoraLabError(f"{self.path} is of a {ours} model, and {original} would be a {names.architecture}")
        for key, attribute in SIZES.items():
            said, theirs = self._said(f"{ours}.{key}", None), getattr(model.config, attribute, None)
            if isinstance(said, int) and theirs is not None and said != theirs:
                raise EoraLabError(
                    f"{self.path} was not made from {original}: its {key} is {said}, that of the model {theirs}"
                )

    def _check_shapes(self, model: nn.Module, parts: dict[str, list[Part]], original: str) -> None:
        """Raise EoraLabError when a quantised linear is of another shape."""
        for module, own in parts.items():
            shapes = [self._tensors[self._place(name)[0]].shape for name, _ in own]  # in, out, experts
            ours = sum(int(shape[1]) for shape in shapes), int(shapes[0][0])
            if ours != (theirs := tuple(linear_at(model, module).weight.shape)):
                raise EoraLabError(f"{self.path} was not made from {original}: {module} is {ours}, not {theirs}")

    def _check_others(self, names: GgufNames, model: nn.Module, quantised: Container[str], original: str) -> None:
        """Raise EoraLabError when a parameter beside the quantised linears is missing, or is another."""
        experts = tuple(f"{name}." for name in mixtures(model))
        for key, parameter in model.named_parameters():
            module, kind = key.rpartition(".")[::2]
            name = None if key.startswith(experts) else names.find(module)
            if name is None or (kind == "weight" and module in quantised):
                continue
            tensor = self._tensors.get(f"{name}.{kind}")
            if tensor is None:
                raise EoraLabError(f"{self.path} lacks the tensor {name}.{kind}, {key} of {original}")
            if not self._alike(tensor, names.permuted(name, parameter.detach())):
                raise EoraLabError(f"{self.path} was not made from {original}: {name}.{kind} is not its {key}")

    def _alike(self, tensor: Any, parameter: Float[Tensor, "rows ..."]) -> bool:
        """Whether a tensor of the file can be that parameter. Conversion may leave out rows, and add 1 to norms."""
        import gguf

        plain = tensor.tensor_type.name in PLAIN
        rows = tensor.data if tensor.data.ndim == parameter.ndim else tensor.data[None]
        if not plain and not dequantises(tensor.tensor_type.name):
            return True  # who knows
        if parameter.ndim == 1 and len(rows) != len(parameter):
            return False
        some = slice(None, None, max(len(rows) // ROWS, 1) if parameter.ndim > 1 else 1)
        ours = torch.from_numpy(np.array(gguf.quants.dequantize(np.array(rows[some]), tensor.tensor_type)))
        theirs = parameter[: len(rows)][some].float().cpu()
        if ours.shape != theirs.shape:
            return False
        bound = (ROUNDING if plain else UNRELATED) * theirs.norm()
        shifts = (0, 1) if theirs.ndim == 1 else (0,)
        return any(bool((ours - theirs - shift).norm() <= bound) for shift in shifts)

    def _place(self, name: str) -> tuple[str, int | None]:
        """The tensor of a linear, and which of its experts it is."""
        stem, number = name.rpartition(".")[::2]
        return (f"{stem}.weight", int(number)) if number.isdecimal() else (f"{name}.weight", None)

    def _type(self, key: str) -> str:
        return self._tensors[key].tensor_type.name

    def _said(self, key: str, default: Any) -> Any:
        """What the head says under a key; the default too where that is no number and no text."""
        try:
            said = self._fields[key].contents() if key in self._fields else default
        except UnicodeDecodeError as error:
            raise EoraLabError(f"cannot read {self.path}: {key} is damaged, get it again") from error
        return said if isinstance(said, int | str) else default


def read_gguf_file(path: Path) -> Any:
    """The reader of one file. Raises EoraLabError with what is wrong with it."""
    import gguf

    class Reader(gguf.GGUFReader):
        """It refuses to read beyond the end of the file, where numpy would hand out less than was asked for."""

        def _get(self, offset, dtype, count=1, override_order=None):
            if not 0 <= int(offset) + np.dtype(dtype).itemsize * int(count) <= len(self.data):
                raise ValueError("it ends early")
            return super()._get(offset, dtype, count, override_order)

    try:
        with np.errstate(all="ignore"):
            reader = Reader(path)
    except FileNotFoundError as error:
        raise EoraLabError(f"{path} is missing: all parts of a model must lie beside one another") from error
    except Exception as error:  # it raises whatever it stumbles over
        reason = one_line(error)
        if "GGMLQuantizationType" in reason:
            newer = f"gguf {metadata.version('gguf')} does not know a type in it: install a newer one"
            raise EoraLabError(f"cannot read {path}: {newer}, or quantise the model to another type") from error
        raise EoraLabError(f"cannot read {path}: {reason}; it is no GGUF file, or damaged: get it again") from error
    if reader.byte_order != "I":
        raise EoraLabError(f"{path} is of the other byte order: convert it with gguf's gguf-convert-endian")
    return reader
