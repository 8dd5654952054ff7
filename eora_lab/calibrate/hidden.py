"""Hidden states on their way from block to block: in memory, or in files that the system maps into memory."""

import shutil
import warnings
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from eora_lab.environment import step
from eora_lab.files import DamagedError, read_checked, read_tensors, write_checked

NAME = "hidden_states"  # of the tensor in a file


class HiddenStates(list[Tensor]):
    """In memory: what goes into the next block, (..., batch, seqlen, hidden_size), one a mini-batch."""

    def begin(self, index: int) -> None:
        """All of them go into this block now: what went into others is not needed any more."""

    def kept(self) -> list[int]:
        """Blocks whose inputs lie in files, all of them."""
        return []

    def take(self, index: int) -> bool:  # noqa: ARG002
        """Go on with the inputs of this block, if they are whole: are they?"""
        return False


class HiddenFiles(HiddenStates):
    """In a folder: 003/00007.safetensors is what mini-batch 7 hands block 3, with a checksum.

    Files of a block are there until `begin` of a later one, so that one block's are whole whenever a run stops.
    Raises EoraLabError when one cannot be written.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._folder, self._next = folder, list[int]()  # block that each mini-batch goes into next

    def __getitem__(self, mini_batch):  # type: ignore[no-untyped-def]
        return super().__getitem__(mini_batch).to(self._device)

    def append(self, hidden: Float[Tensor, "... hidden"]) -> None:
        """Of one more mini-batch, for the first block."""
        self._device = hidden.device
        self._next.append(0)
        super().append(self._stored(len(self), 0, hidden))

    def __setitem__(self, mini_batch, hidden) -> None:  # type: ignore[no-untyped-def]
        self._next[mini_batch] += 1
        super().__setitem__(mini_batch, self._stored(mini_batch, self._next[mini_batch], hidden))

    def begin(self, index: int) -> None:
        """See `HiddenStates`."""
        for folder in self._folder.glob("[0-9]*"):
            if folder != self._of(index):
                shutil.rmtree(folder, ignore_errors=True)

    def kept(self) -> list[int]:
        """See `HiddenStates`."""
        found = [int(folder.name) for folder in self._folder.glob("[0-9]*") if folder.name.isdecimal()]
        return [index for index in found if all(self._file(one, index).exists() for one in range(len(self)))]

    @step("files")
    def take(self, index: int) -> bool:
        """See `HiddenStates`. Those that are damaged are told in a warning."""
        try:
            found = [read_checked(self._file(one, index))[0][NAME] for one in range(len(self))]
        except (DamagedError, KeyError) as error:
            warnings.warn(f"{error}: finished blocks are run again to make it anew", stacklevel=2)
            return False
        self._next = [index] * len(self)
        for one, hidden in enumerate(found):
            super().__setitem__(one, hidden)
        return True

    def _of(self, index: int) -> Path:
        return self._folder / f"{index:03d}"

    def _file(self, mini_batch: int, index: int) -> Path:
        return self._of(index) / f"{mini_batch:05d}.safetensors"

    @step("files")
    def _stored(self, mini_batch: int, index: int, hidden: Tensor) -> Tensor:
        """The same tensor, in a file that is mapped into memory."""
        path = self._file(mini_batch, index)
        write_checked(path, {NAME: hidden}, {})
        return read_tensors(path)[NAME]
