"""What every reader of compressed checkpoints gives: W^ by module name, and whether a model can be the original."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from eora_lab.compress import Compressed


class Checkpoint(Mapping[str, Compressed]):
    """The compressed linears of a checkpoint: module name -> W^, read from the files when asked for."""

    folder: Path

    @abstractmethod
    def check_model(self, model: nn.Module) -> None:
        """Raise EoraLabError unless this can be a checkpoint of `model`, by all but the codes themselves."""

    @abstractmethod
    def settings(self) -> dict:
        """The settings of a `Recipe` that say how the weights were compressed."""
