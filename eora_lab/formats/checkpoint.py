"""What every reader of compressed checkpoints gives: W^ by module name, and whether a model can be the original.

And by what a reader knows its own: what a folder says of its weights in config.json.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import nn

from eora_lab.compress import Compressed
from eora_lab.errors import EoraLabError
from eora_lab.files import digest, file_digest, read_json


class Checkpoint(Mapping):
    """The compressed linears of a checkpoint: name -> W^, a `Compressed`, read from the files when asked for.

    Names are those of the files; `of` gives them by a model's.
    path: its folder, or its file.
    """

    path: Path

    @property
    def files(self) -> list[Path]:
        """That hold its weights."""
        return sorted(self.path.glob("*.safetensors"))

    @property
    @abstractmethod
    def base(self) -> str:
        """How the weights were compressed, in short: "GGUF Q2_K", "GPTQ 4-bit g128"."""

    def sha256(self) -> str:
        """SHA-256 of the file that holds its weights; of the names and SHA-256 of all, where there are several."""
        found = {file.name: file_digest(file) for file in self.files}
        return next(iter(found.values())) if len(found) == 1 else digest(found)

    @abstractmethod
    def check_model(self, model: nn.Module) -> None:
        """Raise EoraLabError unless this can be a checkpoint of `model`, by all but the codes themselves."""

    def of(self, model: nn.Module) -> Mapping:
        """The same by the names of the linears in the blocks of `model`, its original. Raises as `check_model`."""
        self.check_model(model)
        return self


class Lazy(Mapping):
    """name -> W^, each made when it is asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Compressed]]):
        self._makers = makers

    def __getitem__(self, name: str) -> Compressed:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def json_object(path: Path) -> dict:
    """The object in a JSON file; empty if there is no file. Raises EoraLabError when it is damaged."""
    return read_json(path) if path.exists() else {}


def quantization(folder: Path) -> dict:
    """`quantization_config` in the config.json of a folder; empty where it has none.

    Raises EoraLabError when it is damaged.
    """
    said = json_object(folder / "config.json").get("quantization_config")
    if said is not None and not isinstance(said, dict):
        raise EoraLabError(f"{folder}: quantization_config in config.json must be an object, not {said!r}")
    return said or {}


def quantised_as(*methods: str) -> Callable[[Path], bool]:
    """A `detects` of `Format`: whether a folder says that it was quantised by one of these (`quant_method`)."""
    return lambda path: str(quantization(path).get("quant_method", "")).lower() in methods
