"""How the low-rank factors are stored: in 16 bits, or in few (the paper's table T13)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.lowrank import LowRank
from eora_lab.compress import Compressed, gptq, rtn, tagged_state_dict, weight_from_state_dict
from eora_lab.errors import EoraLabError

FACTORS = ("lora_A", "lora_B")  # begin the names of the tensors of a low-rank path
OF = "lora_A.of"  # the tensor that names the layer whose A is used


@dataclass(frozen=True)
class StoredFactors:
    """A (rank, in) and B (out, rank), float16 or on a grid like compressed weights.

    A_of: full name of the layer whose A this is, where layers share it: there it is stored and counted. Empty: its own.
    """

    A: Tensor | Compressed
    B: Tensor | Compressed
    A_of: str = ""

    def dense(self) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """(A, B) float32, as a matrix product sees them."""
        A, B = (f.float() if isinstance(f, Tensor) else f.dense() for f in (self.A, self.B))
        return A, B

    def matrices(self) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """The same without a copy of what is stored as matrices: those are float16."""
        A, B = (f if isinstance(f, Tensor) else f.dense() for f in (self.A, self.B))
        return A, B

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.B.nbytes + (0 if self.A_of else self.A.nbytes)

    def cut(self, sizes: Sequence[int], names: Sequence[str]) -> list["StoredFactors"]:
        """For layers whose rows are stacked: the rows of B that each has, and A, which is that of the first.

        sizes: rows of the layers. names: their full names.
        """
        stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        parts = [_rows(self.B, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
        return [StoredFactors(self.A, B, names[0] if i else "") for i, B in enumerate(parts)]

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for safetensors; of an A that is stored elsewhere the name of that layer."""
        state = {OF: torch.tensor(list(self.A_of.encode()), dtype=torch.uint8)} if self.A_of else {}
        for name, factor in (("lora_A", self.A), ("lora_B", self.B)):
            if name == "lora_A" and self.A_of:
                continue
            if isinstance(factor, Tensor):
                state[name] = factor
            else:
                state |= {f"{name}.{key}": tensor for key, tensor in tagged_state_dict(factor).items()}
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "StoredFactors":
        """The inverse of `state_dict`, with A where it is another layer's too (`with_shared`).

        Raises KeyError when a tensor is missing.
        """

        def read(name: str) -> Tensor | Compressed:
            prefix = f"{name}."
            parts = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix) and key != OF}
            return weight_from_state_dict(parts) if parts else state[name]

        return cls(read("lora_A"), read("lora_B"), _name(state[OF]) if OF in state else "")


def with_shared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of several layers by full name, with those of A wherever a layer uses another one's.

    Raises KeyError where that layer is not among them.
    """
    found = dict(tensors)
    for key in [key for key in tensors if key.endswith(f".{OF}")]:
        first, layer = _name(tensors[key]), key.removesuffix(OF)
        own = [other for other in tensors if other.startswith(f"{first}.lora_A") and not other.endswith(f".{OF}")]
        if not own:
            raise KeyError(f"{first}.lora_A")
        found |= {f"{layer}{other.removeprefix(f'{first}.')}": tensors[other] for other in own}
    return found


def _name(letters: Tensor) -> str:
    return bytes(letters.tolist()).decode(errors="replace")


def _rows(factor: Tensor | Compressed, start: int, stop: int) -> Tensor | Compressed:
    """Some rows of B."""
    if isinstance(factor, Tensor):
        return factor[start:stop].contiguous()
    state = factor.state_dict()
    return type(factor).from_state_dict(
        {name: tensor if name in factor.whole else tensor[start:stop].contiguous() for name, tensor in state.items()}
    )


@runtime_checkable
class RowMetric(Protocol):
    """Such as `OutputStatistics`."""

    def whitened(self, error: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The error as its squares count."""
        ...


def check_factor_bits(bits: int) -> None:
    """Raise EoraLabError unless factors can be stored in `bits` bits."""
    if bits != 16 and not 2 <= bits <= 8:
        raise EoraLabError(f"factor bits must be 16, or between 2 and 8, not {bits}")


def store_factors(
    answer: LowRank,
    bits: int = 16,
    fit: tuple[Float[Tensor, "out in"], InputStatistics] | None = None,
    rows: RowMetric | None = None,
) -> StoredFactors:
    """Balanced factors in float16, or factors on `bits`-bit grids, one grid a row; B's columns are then unit vectors.

    fit: R and its input statistics. Rounding is then steered by the output error, as GPTQ's, and not to nearest:
        B Q Qᵀ A = B A for a random rotation Q, whose components have equal shares of the energy. B Q is rounded with
        their second moment Qᵀ A S Aᵀ Q, A fitted again to that B^ as (B^ᵀ B^)^-1 B^ᵀ R, and rounded with S. Rounding
        errors of one component are thus made good by the others: what they cost falls from the arithmetic mean of the
        spectrum towards its geometric mean.
    rows: what errors are measured in on the side of the output, where the answer is the optimum in that: A is then
        fitted in it.
    Raises EoraLabError on bits out of range.
    """
    check_factor_bits(bits)
    if bits == 16 or not answer.rank:
        balanced = answer.balanced()
        return StoredFactors(balanced.A.half().contiguous(), balanced.B.half().contiguous())
    grid: dict[str, Any] = {"bits": bits, "group_size": -1, "zero_point": "integer", "scale_dtype": "float16"}
    A, B = answer.A.double(), answer.B.double()
    norm = B.norm(dim=0)
    A, B = A * norm[:, None], B / torch.where(norm > 0, norm, 1)
    if not fit:
        return StoredFactors(rtn(A.float(), None, **grid), rtn(B.float(), None, **grid))
    residual, statistics = fit
    Q = rotation(answer.rank).to(B)
    A, B = Q.T @ A, B @ Q
    moment = A @ statistics.second_moment.double() @ A.T  # where A avoids loud directions, large terms cancel
    left = gptq(B.float(), InputStatistics.from_second_moment((moment + moment.T).float() / 2), **grid)
    B, R = left.dense().double(), residual.double()
    if rows:
        B, R = rows.whitened(B), rows.whitened(R)
    A = torch.linalg.pinv(B) @ R
    return StoredFactors(gptq(A.float(), statistics, **grid), left)


def rotation(size: int) -> Float[Tensor, "size size"]:
    """A random orthogonal matrix, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
