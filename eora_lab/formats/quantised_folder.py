"""What checkpoint folders of all quantisers have in common: JSON files and safetensors, and what is checked of them.

One tensor is read at a time; a model is known as the original by all that is not quantised.

A reader of one format says which tensors a quantised linear has, and how W^ is made of them.
"""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eora_lab.compress import Compressed
from eora_lab.errors import EoraLabError, naming
from eora_lab.formats.checkpoint import Checkpoint, Lazy, json_object, quantization
from eora_lab.formats.checkpoint_names import Part, PublishedNames
from eora_lab.formats.joined import Making, joined
from eora_lab.model.structure import model_name

SAME = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
ROUNDING = 0.05  # relative distance of a dense tensor that 16 bits explain many times over
DAMAGED = "the checkpoint is damaged, or its configuration is that of another"
# stored beside weights by some tools, and read by no loader of a model, or about the cache of keys and values alone
UNUSED = (r"rotary_emb\.inv_freq$", r"\.[qkv]_(scale|zero_point|global_scale)$", r"\.prob_output_scale$")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class QuantisedFolder(Checkpoint):
    """The quantised linears of a folder: module name -> W^, read from the files when asked for.

    One safetensors file or several. Subclasses give `base`, `configure` and `read`, and set:
    format:  what the folder is, in errors.
    tensors: of a quantised linear, what follows its name; the first is there for each, and by it they are known.
    Raises EoraLabError when the folder is no such checkpoint, or incomplete or damaged.
    """

    format: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path | str):
        """Read JSON files and the names of tensors; tensors themselves are read when a linear is asked for."""
        self.path = Path(folder)
        self.model_config = json_object(self.path / "config.json")
        with naming(str(folder)):
            self.configure()
        self._files = self._read_headers()
        self._names = dict.fromkeys(self.find())
        if not self._names:
            raise EoraLabError(
                f"{folder} is no {self.format} checkpoint: no tensor in it is named {self.tensors[0]}; if its weights "
                "are dense, delete quantization_config from its config.json and use it as a model"
            )

    @abstractmethod
    def configure(self) -> None:
        """Read what the folder says of its weights. Raises EoraLabError on what may mean other values than are read."""

    @abstractmethod
    def read(self, name: str) -> Compressed:
        """W^ of one linear. Raises EoraLabError where a tensor of it is missing or not as it must be."""

    def find(self) -> list[str]:
        """The names of quantised linears."""
        mark = f".{self.tensors[0]}"
        return sorted(key.removesuffix(mark) for key in self._files if key.endswith(mark))

    def keys_of(self, name: str) -> list[str]:
        """The keys of the files that may hold tensors of a quantised linear."""
        return [f"{name}.{kind}" for kind in self.tensors]

    @property
    def said(self) -> dict:
        """quantization_config in config.json."""
        return quantization(self.path)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Compressed:
        if name not in self:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def keys_held(self) -> list[str]:
        """The names of all tensors in the files."""
        return sorted(self._files)

    def has(self, key: str) -> bool:
        """Whether the files hold that tensor."""
        return key in self._files

    def tensor(self, key: str, index: int | None = None) -> Shaped[Tensor, "..."]:
        """Any tensor of the files; index: one part of its first dimension alone."""
        with self._opened(key) as file:
            return file.get_tensor(key) if index is None else file.get_slice(key)[index]

    def shape(self, key: str) -> list[int]:
        """Of any tensor of the files."""
        with self._opened(key) as file:
            return file.get_slice(key).get_shape()

    def metadata(self, key: str) -> dict[str, str]:
        """Of the file that holds a tensor."""
        with self._opened(key) as file:
            return file.metadata() or {}

    def take(
        self, key: str, *dtypes: torch.dtype, shape: Sequence[int | None] | None = None, index: int | None = None
    ) -> Shaped[Tensor, "..."]:
        """A tensor of one of these types, and of that shape, where None stands for any size. index: as of `tensor`.

        Raises EoraLabError where it is missing or another, and on NaN and Inf.
        """
        tensor = self.tensor(key, index)
        if tensor.dtype not in dtypes:
            wanted = " or ".join(map(_short, dtypes))
            raise EoraLabError(f"{self.path}: {key} is {_short(tensor.dtype)}, not {wanted}: {DAMAGED}")
        if shape is not None:
            sizes = [ours if asked is None else asked for asked, ours in zip(shape, tensor.shape, strict=False)]
            if len(shape) != tensor.ndim or sizes != list(tensor.shape):
                asked = " x ".join("any" if size is None else str(size) for size in shape)
                found = " x ".join(map(str, tensor.shape))
                raise EoraLabError(f"{self.path}: {key} is {found or 'one number'}, not {asked}: {DAMAGED}")
        return self.finite(key, tensor) if tensor.is_floating_point() else tensor

    def exponents(self, key: str, shape: Sequence[int | None], index: int | None = None) -> Shaped[Tensor, "..."]:
        """Powers of two, as E8M0 in bytes. Raises as `take`."""
        return self.finite(key, self.take(key, torch.uint8, shape=shape, index=index).view(torch.float8_e8m0fnu))

    def finite(self, key: str, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The tensor. Raises EoraLabError on NaN and Inf in it."""
        if not torch.isfinite(tensor.float()).all():
            raise EoraLabError(f"{self.path}: {key} has NaN or Inf: {DAMAGED}")
        return tensor

    @contextmanager
    def _opened(self, key: str) -> Iterator[Any]:
        """The file that holds a tensor."""
        if key not in self._files:
            raise EoraLabError(f"{self.path} lacks the tensor {key}: copy or download it again")
        try:
            with safe_open(self.path / self._files[key], framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise EoraLabError(f"cannot read {key} in {self.path}: {error}") from error

    def check_model(self, model: nn.Module) -> None:
        """Raise EoraLabError unless this can be a checkpoint of `model`, by all but the codes themselves.

        Compared are the sizes in config.json, the names of linears, and the tensors that are not quantised.
        """
        self.of(model)

    def of(self, model: nn.Module) -> Mapping:
        """module name -> W^, by the names of the model; parts of an expert's linear come together.

        Raises EoraLabError as `check_model`.
        """
        original = model_name(model) or "the given model"
        self._check_sizes(model, original)
        names = PublishedNames(model, self._files.keys() | self._names.keys())
        parts: dict[str, list[Part]] = {}
        for module, own in names.linears.items():
            if any(name in self for name, _ in own):
                parts[module] = own
        known = {name for own in parts.values() for name, _ in own}
        for name in self._names:
            if name not in known and not names.ignored(f"{name}.weight"):
                raise EoraLabError(
                    f"{self.path} quantises {name}, which is no linear layer in the decoder blocks of {original}"
                )
        for module, own in parts.items():
            if lacking := [name for name, _ in own if name not in self]:
                raise EoraLabError(f"{self.path} lacks the quantised {lacking[0]}, which is of {module} in {original}")
        self._check_dense(names, known, original)
        return Lazy({module: partial(joined, self._makers(own)) for module, own in parts.items()})

    def _makers(self, own: list[Part]) -> list[Making]:
        """What `joined` takes."""
        return [(partial(self.__getitem__, name), rows) for name, rows in own]

    def _check_sizes(self, model: nn.Module, original: str) -> None:
        """Raise EoraLabError where config.json says another size than the model's."""
        for key in SAME:
            ours, theirs = self.model_config.get(key), getattr(model.config, key, None)
            if None not in (ours, theirs) and ours != theirs:
                raise EoraLabError(
                    f"{self.path} was not made from {original}: its {key} is {ours}, that of the model {theirs}"
                )

    def _check_dense(self, names: PublishedNames, known: set[str], original: str) -> None:
        """Raise EoraLabError where a tensor that is not quantised is missing, another, or of no model."""
        quantised = {key for name in self._names for key in self.keys_of(name)}
        given = quantised | {f"{name}.weight" for name in known}
        expected = {key: tensor for key, tensor in names.tensors.items() if key not in given}
        for key in expected:
            if not any(other in self._files for other in names.tied.get(key, [key])):
                raise EoraLabError(f"{self.path} lacks the tensor {key} of {original}")
        for key in filter(self._files.__contains__, expected):
            self._check_tensor(key, expected[key](), original)
        for file in sorted(self._files.keys() - expected.keys() - quantised):
            if file.endswith(".bias") and file.removesuffix(".bias") in self:
                if self.tensor(file).any():  # some tools write a bias of zeros for every linear
                    raise EoraLabError(f"{self.path} was not made from {original}: the model has no {file}")
            elif not names.ignored(file) and not any(re.search(one, file) for one in UNUSED):
                raise EoraLabError(
                    f"{self.path} holds {file}, which is no tensor of {original}, nor known in a {self.format} one"
                )

    def _check_tensor(self, key: str, theirs: Tensor, original: str) -> None:
        """Raise EoraLabError unless a dense tensor is that of the model, but for rounding."""
        ours, theirs = self.tensor(key), theirs.float()
        if ours.shape != theirs.shape:
            raise EoraLabError(
                f"{self.path} was not made from {original}: {key} is {tuple(ours.shape)}, in the model "
                f"{tuple(theirs.shape)}"
            )
        if not (ours.to(theirs) - theirs).norm() <= ROUNDING * theirs.norm():
            raise EoraLabError(f"{self.path} was not made from {original}: the values of {key} differ")

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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
