"""What every reader of compressed checkpoints gives: W^ by module name, and whether a model can be the original.

And by what a reader knows its own: what a folder says of its weights in config.json.
"""

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from eora_lab.compress import Compressed
from eora_lab.errors import EoraLabError
from eora_lab.files import digest, file_digest


class Checkpoint(Mapping[str, Compressed]):
    """The compressed linears of a checkpoint: module name -> W^, read from the files when asked for.

    path: its folder, or its file.
    """

    path: Path

    @property
    @abstractmethod
    def base(self) -> str:
        """How the weights were compressed, in short: "GGUF Q2_K", "GPTQ 4-bit g128"."""

    def sha256(self) -> str:
        """SHA-256 of its file, or of the names and SHA-256 of the weight files in its folder."""
        if self.path.is_file():
            return file_digest(self.path)
        return digest({file.name: file_digest(file) for file in sorted(self.path.glob("*.safetensors"))})

    @abstractmethod
    def check_model(self, model: nn.Module) -> None:
        """Raise EoraLabError unless this can be a checkpoint of `model`, by all but the codes themselves."""


def json_object(path: Path) -> dict:
    """The object in a JSON file; empty if there is no file. Raises EoraLabError when it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise EoraLabError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise EoraLabError(f"cannot read {path}: it is no JSON object")
    return data


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
