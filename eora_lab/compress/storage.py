"""What a compressor returns: a weight in some storage. A new kind of storage is one class like these, and one name.

A file holds the tensors of `state_dict` and the kind's name, so that no reader has to guess.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from eora_lab.errors import EoraLabError

UNCOUNTED = ("kind", "layout", "levels")  # tensors that a format does not store: its name, sizes, what its codes mean


@dataclass(frozen=True)
class Lattice:
    """An evenly spaced grid: W^[o, i] = origin[o, g] + step[o, g] * code, g = group[i], where kept[o, i], else 0.

    Codes go from 0 to top. kept: None: all.
    """

    origin: Float[Tensor, "out groups"]
    step: Float[Tensor, "out groups"]
    group: Int64[Tensor, " in"]
    top: int
    kept: Bool[Tensor, "out in"] | None = None


class Compressed(ABC):
    """W^ in packed storage.

    kind:  its name in `KINDS`.
    whole: the tensors of `state_dict` that are not cut by rows; every row of the others is a row of the weight.
    bits:  of a weight that is kept.
    """

    kind: ClassVar[str]
    whole: ClassVar[tuple[str, ...]]
    bits: int

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight that a matrix product sees."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Packed tensors, ready for safetensors. Those of `UNCOUNTED` are no bytes of the weight."""

    @classmethod
    @abstractmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "Compressed":
        """The inverse of `state_dict`, also of the same rows of its tensors. Raises KeyError when one is missing."""

    def lattice(self) -> Lattice | None:
        """What its codes stand for; None where levels are not evenly spaced."""
        return None

    def with_codes(self, codes: UInt8[Tensor, "out in"]) -> "Compressed":  # noqa: ARG002
        """The same with other codes, where there is a `lattice`."""
        raise EoraLabError(f"a weight stored as {self.kind} has no codes on evenly spaced levels")

    @property
    def nbytes(self) -> int:
        """Bytes as stored: codes and zero points at `bits` bits each, all else in full."""
        return sum(tensor.nbytes for name, tensor in self.state_dict().items() if name not in UNCOUNTED)


KINDS: dict[str, type[Compressed]] = {}  # the package fills it


def tagged_state_dict(weight: Compressed) -> dict[str, Tensor]:
    """What a file must hold of a weight: its tensors, and "kind", the letters of its kind's name."""
    return weight.state_dict() | {"kind": torch.tensor(list(weight.kind.encode()), dtype=torch.uint8)}


def kind_of(state: Mapping[str, Tensor]) -> type[Compressed]:
    """The storage class of the tensors. Raises KeyError without a kind, and EoraLabError for one that is not known."""
    name = bytes(state["kind"].tolist()).decode(errors="replace")
    if name not in KINDS:
        raise EoraLabError(
            f"a weight is stored as {name!r}, which is not known here ({', '.join(KINDS)}): load the plugin that it "
            "was made with"
        )
    return KINDS[name]


def weight_from_state_dict(state: Mapping[str, Tensor]) -> Compressed:
    """Read a weight from what `tagged_state_dict` gave. Raises as `kind_of`, and KeyError without a tensor."""
    return kind_of(state).from_state_dict(state)
